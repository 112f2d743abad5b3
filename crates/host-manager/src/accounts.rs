//! Users and groups of the host by name: what /etc/passwd and /etc/group say. Others, of a directory service, are known by their numbers.

use std::fs;

use crate::users::User;

fn lines(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"))
}

/// A user, by name or by number; of a number, the group has the same.
///
/// # Errors
/// There is none of this name.
pub(crate) fn user(name: &str) -> Result<User, String> {
    if let Ok(number) = name.parse() {
        return Ok(User {
            uid: number,
            gid: number,
        });
    }
    user_in(&lines("/etc/passwd")?, name)
        .ok_or_else(|| format!("there is no account `{name}` in /etc/passwd"))
}

fn user_in(text: &str, name: &str) -> Option<User> {
    text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        match fields.as_slice() {
            [found, _, uid, gid, ..] if *found == name => Some(User {
                uid: uid.parse().ok()?,
                gid: gid.parse().ok()?,
            }),
            _ => None,
        }
    })
}

/// A group, by name or by number.
///
/// # Errors
/// There is none of this name.
pub(crate) fn group(name: &str) -> Result<u32, String> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    group_in(&lines("/etc/group")?, name).ok_or_else(|| format!("there is no group `{name}` in /etc/group"))
}

fn group_in(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1001::/home/alice:/bin/sh\nbroken:x:y\n";
        let alice = User { uid: 1000, gid: 1001 };
        assert_eq!(user_in(passwd, "alice"), Some(alice));
        assert_eq!(user_in(passwd, "broken"), None);
        assert_eq!(user_in(passwd, "bob"), None);
        let groups = "root:x:0:\nkvm:x:106:alice,bob\nbroken\n";
        assert_eq!(group_in(groups, "kvm"), Some(106));
        assert_eq!(
            (group_in(groups, "broken"), group_in(groups, "alice")),
            (None, None)
        );
        assert_eq!((user("7").unwrap().uid, group("8")), (7, Ok(8)));
        assert!(user("no such account").unwrap_err().contains("/etc/passwd"));
        assert!(group("no such group").unwrap_err().contains("/etc/group"));
    }
}
