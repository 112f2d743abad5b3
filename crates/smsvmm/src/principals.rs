//! `smsvmm principal`: who may come through a gateway, and what they may do there.

use std::fmt::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use access::{Fingerprint, Principal, Principals, PrincipalsError, Role, Token};
use anyhow::anyhow;
use api::Utc;
use serde_json::json;

use crate::cli::{PrincipalArguments, PrincipalCommand, RoleName};
use crate::exit::{Exit, UsageError};
use crate::logs;
use crate::output::{print, print_json};

const DAY: u64 = 24 * 3600;

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Viewer => Self::Viewer,
            RoleName::Operator => Self::Operator,
            RoleName::Administrator => Self::Administrator,
        }
    }
}

pub(crate) fn execute(arguments: PrincipalArguments) -> anyhow::Result<Exit> {
    let PrincipalArguments {
        access,
        json,
        command,
    } = arguments;
    match command {
        PrincipalCommand::Add {
            name,
            role,
            vm,
            days,
            certificate,
        } => {
            let mut principals = match Principals::load(&access) {
                // The first one makes the file.
                Err(PrincipalsError::System { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    Principals::default()
                }
                loaded => loaded?,
            };
            let token = match &certificate {
                Some(_) => None,
                None => Some(Token::generate().ok_or_else(|| anyhow!("the system has no random numbers"))?),
            };
            let certificate = certificate.as_deref().map(fingerprint).transpose()?;
            let expires = days.map(|days| now().saturating_add(u64::from(days) * DAY));
            let principal = Principal {
                name: name.clone(),
                role: role.into(),
                machines: vm,
                expires,
                token_sha256: token.as_ref().map(Token::hash),
                certificate_sha256: certificate,
            };
            principals.add(principal, &access)?;
            principals.save(&access)?;
            logs::say(&format!("smsvmm: {name} is known in {}", access.display()));
            if let Some(token) = token {
                if json {
                    print_json(&json!({"name": name, "token": token.reveal()}))?;
                } else {
                    logs::say("smsvmm: the token is shown only now:");
                    print(&format!("{}\n", token.reveal()))?;
                }
            }
        }
        PrincipalCommand::Revoke { name } => {
            let mut principals = Principals::load(&access)?;
            principals.remove(&name, &access)?;
            principals.save(&access)?;
            logs::say(&format!("smsvmm: {name} is not known any more"));
        }
        PrincipalCommand::List => {
            let principals = Principals::load(&access)?;
            if json {
                print_json(&principals.all)?;
            } else {
                print(&table(&principals)?)?;
            }
        }
    }
    Ok(Exit::Success)
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The sum of the certificate in a file.
fn fingerprint(path: &Path) -> anyhow::Result<Fingerprint> {
    let certificate = access::first_certificate(path).map_err(UsageError::new)?;
    Ok(Fingerprint::of(&certificate))
}

fn table(principals: &Principals) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    writeln!(
        text,
        "{:20} {:14} {:12} {:24} machines",
        "name", "role", "known by", "until"
    )?;
    for principal in &principals.all {
        let by = match (&principal.token_sha256, &principal.certificate_sha256) {
            (Some(_), Some(_)) => "both",
            (Some(_), None) => "token",
            _ => "certificate",
        };
        let until = match principal.expires {
            None => "it is revoked".to_owned(),
            Some(end) if principal.has_expired() => format!("{} (over)", Utc::from_unix(end)),
            Some(end) => Utc::from_unix(end).to_string(),
        };
        let machines = match principal.machines.as_slice() {
            [] => "all".to_owned(),
            some => some.join(" "),
        };
        writeln!(
            text,
            "{:20} {:14} {by:12} {until:24} {machines}",
            principal.name,
            principal.role.to_string()
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn principals_are_added_listed_and_revoked() {
        let folder = tempfile::tempdir().unwrap();
        let access = folder.path().join("access.toml");
        let run = |command| {
            execute(PrincipalArguments {
                access: access.clone(),
                json: true,
                command,
            })
        };
        let add = |name: &str| PrincipalCommand::Add {
            name: name.into(),
            role: RoleName::Viewer,
            vm: vec!["web1".into()],
            days: Some(30),
            certificate: None,
        };
        run(add("anna")).unwrap();
        let twice = run(add("anna")).unwrap_err().to_string();
        assert!(twice.contains("already"), "{twice}");
        let read = Principals::load(&access).unwrap();
        assert!(read.all[0].expires.unwrap() > now() + 29 * DAY);
        let text = table(&read).unwrap();
        assert!(
            text.contains("anna") && text.contains("viewer") && text.contains("web1"),
            "{text}"
        );
        run(PrincipalCommand::Revoke { name: "anna".into() }).unwrap();
        assert!(run(PrincipalCommand::Revoke { name: "anna".into() }).is_err());
        assert!(Principals::load(&access).unwrap().all.is_empty());
    }
}
