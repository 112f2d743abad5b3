//! Users of this host who may ask at a socket, beside root and the user who serves it: the kernel says who is at the other end.
//!
//! Each has a role, by his user or by one of his groups, and what that may do says the same table as at a [gateway](crate::Gateway). Without any, the
//! socket can be opened by its owner only; with some, everybody can connect, and is told that he may not if he is none of them.

use access::Role;
use http_body_util::{Either, Full};
use hyper::Request;
use hyper::body::Incoming;
use tracing::info;

use crate::rights::{Asked, Kind};
use crate::routes::{self, Content};
use api::{Problem, ProblemKind, StorageRequest};

/// Somebody of this host, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Local {
    /// A user.
    User(u32),
    /// All who are in a group.
    Group(u32),
}

/// Who may ask, with what role.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locals(Vec<(Local, Role)>);

impl Locals {
    /// All of them.
    pub fn new(locals: Vec<(Local, Role)>) -> Self {
        Self(locals)
    }

    /// Nobody.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The highest role of a user in these groups.
    pub(crate) fn role(&self, user: u32, groups: &[u32]) -> Option<Role> {
        let is_meant = |local: &Local| match local {
            Local::User(number) => *number == user,
            Local::Group(number) => groups.contains(number),
        };
        self.0
            .iter()
            .filter(|(local, _)| is_meant(local))
            .map(|(_, role)| *role)
            .max()
    }
}

/// The request, if `user` may make it in `role`; its body has been read if that decides.
pub(crate) async fn permit(
    user: u32,
    role: Role,
    request: Request<Incoming>,
) -> Result<Request<Content>, Problem> {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or(&path).split('/').collect();
    let rest = meant(&parts);
    let storage: StorageRequest;
    let (asked, request) = match Kind::of(&method, rest) {
        Kind::Storage => {
            let (head, body) = request.into_parts();
            let body = routes::bytes(body).await?;
            storage = routes::parse(&body)?;
            let request = Request::from_parts(head, Either::Right(Full::from(body)));
            (Asked::Storage(&storage), request)
        }
        Kind::Transfer => (Asked::Transfer, request.map(Either::Left)),
        Kind::Path => (Asked::Path(&method, rest), request.map(Either::Left)),
    };
    let needed = asked.needs();
    if role < needed {
        let detail = format!("user {user} is {role}, and this needs {needed}");
        return Err(Problem::new(ProblemKind::Forbidden, detail)
            .remedy("root may; who else may what is in `management.allow` of host.toml"));
    }
    if !asked.only_reads() {
        info!(user, %role, %method, path, "somebody changes something");
    }
    Ok(request)
}

/// What of a path decides: behind a machine's name what its own socket is asked, unless the manager answers itself.
fn meant<'a, 'b>(parts: &'a [&'b str]) -> &'a [&'b str] {
    match parts {
        ["v1", "vms", _] | ["v1", "vms", _, "start" | "shutdown" | "stop" | "console"] => &parts[1..],
        ["v1", "vms", _, rest @ ..] => rest,
        ["v1", rest @ ..] => rest,
        all => all,
    }
}
