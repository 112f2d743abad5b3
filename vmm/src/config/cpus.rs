//! `cpus`: how many vCPUs, how they are arranged, where they run, what they can do.

use std::collections::BTreeSet;
use std::fmt;

use api::InvalidValue;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The guest's processors. In vm.toml a number, or a table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Input", rename_all = "kebab-case")]
pub struct CpuConfig {
    /// Number of vCPUs, 1 to 64; always the product of the next three.
    pub count: u8,
    /// Packages.
    pub sockets: u8,
    /// Cores of a package.
    pub cores: u8,
    /// Threads of a core.
    pub threads: u8,
    /// Host CPUs on which each vCPU may run; empty, or one set per vCPU.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub affinity: Vec<HostCpus>,
    /// Changes to what CPUID offers.
    #[serde(skip_serializing_if = "CpuFeatures::is_default")]
    pub features: CpuFeatures,
    /// Let the guest use hardware virtualisation itself.
    pub nested: bool,
}

impl CpuConfig {
    /// Most vCPUs of a machine.
    pub const MAX: u8 = 64;
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self {
            count: 1,
            sockets: 1,
            cores: 1,
            threads: 1,
            affinity: Vec::new(),
            features: CpuFeatures::default(),
            nested: false,
        }
    }
}

/// Changes to what CPUID offers to the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CpuFeatures {
    /// Features to hide, by the names that Linux shows in /proc/cpuinfo.
    #[serde(default)]
    pub remove: Vec<String>,
}

impl CpuFeatures {
    fn is_default(&self) -> bool {
        self.remove.is_empty()
    }
}

/// `cpus` as it is written; what is left out follows from the rest.
#[derive(Deserialize)]
#[serde(
    rename_all = "kebab-case",
    deny_unknown_fields,
    expecting = "a whole number or a table"
)]
struct Input {
    count: Option<u8>,
    sockets: Option<u8>,
    cores: Option<u8>,
    threads: Option<u8>,
    #[serde(default)]
    affinity: Vec<HostCpus>,
    #[serde(default)]
    features: CpuFeatures,
    #[serde(default)]
    nested: bool,
}

impl TryFrom<Input> for CpuConfig {
    type Error = InvalidValue;

    fn try_from(input: Input) -> Result<Self, InvalidValue> {
        let fail = |message: String| Err(InvalidValue::new(message));
        for (name, value) in [
            ("sockets", input.sockets),
            ("cores", input.cores),
            ("threads", input.threads),
        ] {
            if value == Some(0) {
                return fail(format!("{name} = 0 is impossible; use 1 or more"));
            }
        }
        let given = [input.sockets, input.cores, input.threads]
            .into_iter()
            .flatten()
            .map(u32::from)
            .product::<u32>();
        let count = input.count.map_or(given, u32::from);
        if !(1..=u32::from(Self::MAX)).contains(&count) {
            return fail(format!("{count} vCPUs are impossible; use 1 to {}", Self::MAX));
        }
        // The first that is missing takes up the rest: cores, then sockets, then threads.
        let rest = u8::try_from(count / given).unwrap_or(0);
        let mut rest = if count.is_multiple_of(given) { rest } else { 0 };
        let mut fill = |value: Option<u8>| value.unwrap_or_else(|| std::mem::replace(&mut rest, 1));
        let cores = fill(input.cores);
        let sockets = fill(input.sockets);
        let threads = fill(input.threads);
        if u32::from(sockets) * u32::from(cores) * u32::from(threads) != count {
            return fail(format!(
                "{} sockets, cores and threads do not make {count} vCPUs; sockets x cores x threads must equal count (or leave some out)",
                [input.sockets, input.cores, input.threads]
                    .map(|value| value.map_or("?".to_owned(), |n| n.to_string()))
                    .join(" x ")
            ));
        }
        if !input.affinity.is_empty() && input.affinity.len() != usize::try_from(count).unwrap_or(usize::MAX)
        {
            return fail(format!(
                "affinity has {} entries for {count} vCPUs; give one set of host CPUs per vCPU",
                input.affinity.len()
            ));
        }
        let is_name = |name: &String| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic());
        if let Some(name) = input.features.remove.iter().find(|name| !is_name(name)) {
            return fail(format!(
                "features.remove: `{name}` is not the name of a feature; use those of /proc/cpuinfo"
            ));
        }
        let count = u8::try_from(count).map_err(|_| InvalidValue::new("too many vCPUs"))?;
        Ok(Self {
            count,
            sockets,
            cores,
            threads,
            affinity: input.affinity,
            features: input.features,
            nested: input.nested,
        })
    }
}

/// A set of host CPUs, written as a list ("0-3,8") or an array of lists (["0", "2-3"]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCpus(BTreeSet<u16>);

impl HostCpus {
    /// Host CPUs that an affinity mask of the kernel can name (CPU_SETSIZE).
    pub const LIMIT: u16 = 1024;

    /// Their numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u16> + '_ {
        self.0.iter().copied()
    }

    fn add(&mut self, text: &str) -> Result<(), InvalidValue> {
        let invalid = || {
            InvalidValue::new(format!(
                "`{text}` is not a list of host CPUs; write for example \"0\", \"1-3\" or \"0,4-7\" (0 to {})",
                Self::LIMIT - 1
            ))
        };
        for part in text.split(',') {
            let (first, last) = part.trim().split_once('-').unwrap_or((part.trim(), part.trim()));
            let number = |text: &str| {
                text.parse::<u16>()
                    .ok()
                    .filter(|cpu| *cpu < Self::LIMIT)
                    .ok_or_else(invalid)
            };
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(invalid());
            }
            self.0.extend(first..=last);
        }
        Ok(())
    }
}

impl fmt::Display for HostCpus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        let mut rest = self.0.iter().copied().peekable();
        while let Some(first) = rest.next() {
            let mut last = first;
            while let Some(next) = rest.next_if(|next| *next == last + 1) {
                last = next;
            }
            write!(formatter, "{separator}{first}")?;
            if last > first {
                write!(formatter, "-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

impl Serialize for HostCpus {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostCpus {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Lists;
        impl<'de> Visitor<'de> for Lists {
            type Value = HostCpus;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a list of host CPUs such as \"0-3\" or [\"0\", \"2\"]")
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<HostCpus, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<HostCpus, E> {
                let mut cpus = HostCpus(BTreeSet::new());
                cpus.add(text).map_err(E::custom)?;
                Ok(cpus)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut lists: A) -> Result<HostCpus, A::Error> {
                let mut cpus = BTreeSet::new();
                // An element may itself be anything that is accepted here; depth is bounded by the parser of the file.
                while let Some(HostCpus(more)) = lists.next_element()? {
                    cpus.extend(more);
                }
                if cpus.is_empty() {
                    return Err(serde::de::Error::custom(
                        "an empty set of host CPUs cannot run a vCPU",
                    ));
                }
                Ok(HostCpus(cpus))
            }
        }
        deserializer.deserialize_any(Lists)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(
        count: Option<u8>,
        sockets: Option<u8>,
        cores: Option<u8>,
        threads: Option<u8>,
    ) -> Option<[u8; 4]> {
        let input = Input {
            count,
            sockets,
            cores,
            threads,
            affinity: Vec::new(),
            features: CpuFeatures::default(),
            nested: false,
        };
        CpuConfig::try_from(input)
            .ok()
            .map(|cpus| [cpus.count, cpus.sockets, cpus.cores, cpus.threads])
    }

    #[test]
    fn what_is_left_out_of_the_topology_follows_from_the_rest() {
        assert_eq!(topology(None, None, None, None), Some([1, 1, 1, 1]));
        assert_eq!(topology(Some(4), None, None, None), Some([4, 1, 4, 1]));
        assert_eq!(topology(Some(8), None, None, Some(2)), Some([8, 1, 4, 2]));
        assert_eq!(topology(Some(8), None, Some(2), Some(2)), Some([8, 2, 2, 2]));
        assert_eq!(topology(Some(8), Some(2), Some(2), None), Some([8, 2, 2, 2]));
        assert_eq!(topology(None, Some(2), Some(4), Some(2)), Some([16, 2, 4, 2]));
    }

    #[test]
    fn a_topology_that_does_not_add_up_is_refused() {
        assert_eq!(topology(Some(0), None, None, None), None);
        assert_eq!(topology(Some(65), None, None, None), None);
        assert_eq!(topology(Some(6), Some(4), None, None), None);
        assert_eq!(topology(Some(4), Some(2), Some(4), Some(1)), None);
        assert_eq!(topology(Some(2), Some(4), None, None), None);
        assert_eq!(topology(Some(4), Some(0), None, None), None);
        assert_eq!(topology(None, Some(255), Some(255), Some(255)), None);
    }

    #[test]
    fn host_cpu_lists_are_read_and_shown_as_ranges() {
        let mut cpus = HostCpus(BTreeSet::new());
        cpus.add("0,4-7, 2-3").unwrap();
        assert_eq!(cpus.to_string(), "0,2-7");
        for text in ["", "a", "3-1", "1-", "1024", "-1"] {
            assert!(cpus.add(text).is_err(), "{text}");
        }
    }
}
