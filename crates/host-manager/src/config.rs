//! host.toml: what a host's manager has.
//!
//! ```toml
//! name = "host1"                              # by default the host's own
//! state = "/var/lib/smsvmm"                   # definitions of machines, their logs, events
//! runtime = "/run/smsvmm"                     # sockets
//! [management]
//! socket = "/run/smsvmm/manager.sock"
//! allow = [{ group = "operators", role = "operator" }]   # beside root
//! [[pool]]                                    # or [pool], if there is one
//! devices = ["/dev/vdb", "/dev/vdc"]
//! [machines]
//! at-end = "shut-down"                        # of the manager; or "leave"
//! users = "200000-265535"                     # one for each machine; or an account for all, or "manager"
//! memory-overhead = "1G"                      # most memory of a machine beside its guest's; by default no limit
//! cpu-weight = 100                            # as cpu-max and pids-max: where vm.toml says nothing under [resources]
//! control-group = "/smsvmm"                   # by default what systemd delegates
//! ```
//!
//! Relative paths are relative to the file.

use std::fmt;
use std::path::{Path, PathBuf};

use access::Role;
use api::ByteSize;
use management::{Local, Locals};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use vmm::config::{PoolConfig, ResourcesConfig};

use crate::accounts;
use crate::users::Users;

/// The contents of host.toml.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HostConfig {
    /// The host's name; by default what uname(2) says.
    pub name: Option<String>,
    /// Where definitions of machines, their logs and the events are kept.
    pub state: PathBuf,
    /// Where sockets are; what is there need not outlive a boot.
    pub runtime: PathBuf,
    /// The management socket.
    pub management: Management,
    /// The pools.
    #[serde(default, rename = "pool")]
    pub pools: Pools,
    /// Machines.
    #[serde(default)]
    pub machines: MachinesConfig,
}

/// `[management]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Management {
    /// The Unix socket.
    pub socket: PathBuf,
    /// Users of the host who may ask there, beside root and the manager's own.
    #[serde(default)]
    pub allow: Vec<Allow>,
}

/// One of `[[management.allow]]`: a user, or all of a group.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Allow {
    /// The account's name, or a number.
    user: Option<String>,
    /// The group's name, or a number.
    group: Option<String>,
    /// What they may.
    role: Role,
}

impl Management {
    /// Who may ask, by number.
    ///
    /// # Errors
    /// There is no such user or group; the message says which.
    pub fn locals(&self) -> Result<Locals, String> {
        let local = |allow: &Allow| match (&allow.user, &allow.group) {
            (Some(user), None) => Ok((Local::User(accounts::user(user)?.uid), allow.role)),
            (None, Some(group)) => Ok((Local::Group(accounts::group(group)?), allow.role)),
            _ => Err("each has either a user or a group".to_owned()),
        };
        let locals = self.allow.iter().map(local).collect::<Result<_, String>>();
        locals
            .map(Locals::new)
            .map_err(|error| format!("management.allow: {error}"))
    }
}

/// `[pool]`, or several `[[pool]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pools {
    /// One.
    One(PoolConfig),
    /// Any number.
    Several(Vec<PoolConfig>),
}

impl<'de> Deserialize<'de> for Pools {
    /// By hand, as what is derived would not tell what is wrong with a pool.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Pools;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("[pool] or [[pool]] with devices = [...]")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Pools, A::Error> {
                PoolConfig::deserialize(MapAccessDeserializer::new(map)).map(Pools::One)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Pools, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(items)).map(Pools::Several)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl Default for Pools {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Pools {
    /// All of them.
    pub fn all(&self) -> &[PoolConfig] {
        match self {
            Self::One(pool) => std::slice::from_ref(pool),
            Self::Several(pools) => pools,
        }
    }

    fn all_mut(&mut self) -> &mut [PoolConfig] {
        match self {
            Self::One(pool) => std::slice::from_mut(pool),
            Self::Several(pools) => pools,
        }
    }
}

/// `[machines]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct MachinesConfig {
    /// What becomes of machines when the manager is told to end.
    pub at_end: AtEnd,
    /// As whom their processes run.
    pub users: Users,
    /// Where their control groups are made, as a path in the tree of control groups; by default in what systemd delegates.
    pub control_group: Option<PathBuf>,
    /// As in vm.toml, for machines that do not say it.
    pub cpu_weight: Option<u32>,
    /// As in vm.toml, for machines that do not say it.
    pub cpu_max: Option<u32>,
    /// As in vm.toml, for machines that do not say it.
    pub pids_max: Option<u32>,
    /// The most memory beside that of the guest, for machines that do not say how much there may be in all.
    pub memory_overhead: Option<ByteSize>,
}

impl MachinesConfig {
    /// What machines have that do not say it; but for memory, which depends on the guest's.
    fn resources(&self) -> ResourcesConfig {
        ResourcesConfig {
            cpu_weight: self.cpu_weight,
            cpu_max: self.cpu_max,
            memory_max: None,
            pids_max: self.pids_max,
        }
    }
}

/// What becomes of machines when the manager is told to end.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AtEnd {
    /// Their guests are asked to shut down, and waited for.
    #[default]
    ShutDown,
    /// They go on, and their disks wait for the next manager.
    Leave,
}

impl HostConfig {
    /// Makes relative paths absolute.
    ///
    /// # Errors
    /// A value is impossible; what is said is for a person.
    pub fn complete(&mut self, folder: &Path) -> Result<(), String> {
        for path in [&mut self.state, &mut self.runtime, &mut self.management.socket] {
            *path = folder.join(&*path);
        }
        for pool in self.pools.all_mut() {
            pool.check()
                .map_err(|(key, problem)| format!("{key} of a pool {problem}"))?;
            pool.complete(folder);
        }
        let checked = self.machines.resources().check();
        checked.map_err(|(key, text)| format!("machines.{key} {text}"))
    }

    /// The host's name.
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            let name = rustix::system::uname();
            name.nodename().to_string_lossy().into_owned()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pools: &str) -> Result<HostConfig, toml::de::Error> {
        let text = format!("state = \"s\"\nruntime = \"/run/x\"\n[management]\nsocket = \"m.sock\"\n{pools}");
        toml::from_str(&text)
    }

    #[test]
    fn there_may_be_no_pool_or_one_or_several() {
        assert!(read("").unwrap().pools.all().is_empty());
        assert_eq!(read("[pool]\ndevices = [\"a\"]").unwrap().pools.all().len(), 1);
        let mut two =
            read("[[pool]]\ndevices = [\"a\"]\n[[pool]]\ndevices = [\"/b\", \"nbd://x/y\"]").unwrap();
        two.complete(Path::new("/etc/smsvmm")).unwrap();
        assert_eq!(two.state, Path::new("/etc/smsvmm/s"));
        assert_eq!(two.runtime, Path::new("/run/x"));
        assert_eq!(two.pools.all()[0].devices, ["/etc/smsvmm/a"]);
        assert_eq!(two.pools.all()[1].devices, ["/b", "nbd://x/y"]);
        assert!(!two.name().is_empty());
    }

    #[test]
    fn who_may_ask() {
        let locals =
            |allow: &str| read(&format!("allow = [{allow}]")).map(|config| config.management.locals());
        let all = r#"{ user = "root", role = "viewer" }, { user = "4711", role = "operator" }, { group = "0", role = "administrator" }"#;
        let expected = vec![
            (Local::User(0), Role::Viewer),
            (Local::User(4711), Role::Operator),
            (Local::Group(0), Role::Administrator),
        ];
        assert_eq!(locals(all).unwrap(), Ok(Locals::new(expected)));
        assert_eq!(locals("").unwrap(), Ok(Locals::default()));
        for (wrong, what) in [
            (r#"{ role = "viewer" }"#, "either a user or a group"),
            (
                r#"{ user = "root", group = "root", role = "viewer" }"#,
                "either a user or a group",
            ),
            (
                r#"{ group = "no such group", role = "viewer" }"#,
                "management.allow: there is no group",
            ),
        ] {
            let error = locals(wrong).unwrap().unwrap_err();
            assert!(error.contains(what), "{error}");
        }
        let error = locals(r#"{ user = "root", role = "king" }"#)
            .unwrap_err()
            .to_string();
        assert!(error.contains("unknown variant `king`"), "{error}");
    }

    #[test]
    fn mistakes_are_told() {
        let mut many = read("[pool]\ndevices = [\"a\"]\nio-helpers = 9").unwrap();
        let error = many.complete(Path::new("/")).unwrap_err();
        assert_eq!(error, "io-helpers of a pool is more than 8");
        let error = read("[pool]\ndevice = [\"a\"]").unwrap_err().to_string();
        assert!(
            error.contains("unknown field `device`, expected `devices`"),
            "{error}"
        );
        assert!(
            read("[machines]\nat-end = \"kill\"")
                .unwrap_err()
                .to_string()
                .contains("shut-down")
        );
        assert!(
            read("[machines]\nusers = \"7\"")
                .unwrap_err()
                .to_string()
                .contains("200000-265535")
        );
        let mut wrong = read("[machines]\npids-max = 1").unwrap();
        assert!(
            wrong
                .complete(Path::new("/"))
                .unwrap_err()
                .contains("machines.pids-max")
        );
        assert!(
            read("[[pool]]\ndevices = []")
                .unwrap()
                .complete(Path::new("/"))
                .is_err()
        );
    }
}
