//! What a refused or failed operation answers: problem details after RFC 9457.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The kinds of problems that a caller may want to tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProblemKind {
    /// The request is not understood: malformed, unknown key, impossible value.
    #[serde(rename = "urn:smsvmm:problem:invalid")]
    Invalid,
    /// It is not known who the caller is.
    #[serde(rename = "urn:smsvmm:problem:unauthenticated")]
    Unauthenticated,
    /// The caller may not do this.
    #[serde(rename = "urn:smsvmm:problem:forbidden")]
    Forbidden,
    /// There is no such object.
    #[serde(rename = "urn:smsvmm:problem:not-found")]
    NotFound,
    /// The object does not do this.
    #[serde(rename = "urn:smsvmm:problem:method-not-allowed")]
    MethodNotAllowed,
    /// The object is not in a state in which this is possible: a duplicate identifier, a machine already paused.
    #[serde(rename = "urn:smsvmm:problem:conflict")]
    Conflict,
    /// What the caller said must be so is not: somebody has changed the object meanwhile, or it is there already.
    #[serde(rename = "urn:smsvmm:problem:precondition")]
    Precondition,
    /// The key of the request was used for another one: see `Idempotency-Key`.
    #[serde(rename = "urn:smsvmm:problem:key-reused")]
    KeyReused,
    /// The body is larger than the server takes.
    #[serde(rename = "urn:smsvmm:problem:too-large")]
    TooLarge,
    /// The host refused something: a file that cannot be opened, no memory, a busy interface.
    #[serde(rename = "urn:smsvmm:problem:host")]
    Host,
    /// All slots of the guest's bus, or all connections, are taken.
    #[serde(rename = "urn:smsvmm:problem:exhausted")]
    Exhausted,
    /// The caller has tried too often in vain; it may try again later.
    #[serde(rename = "urn:smsvmm:problem:too-many")]
    TooMany,
    /// The machine is about to end.
    #[serde(rename = "urn:smsvmm:problem:stopping")]
    Stopping,
    /// The machine did not answer in time.
    #[serde(rename = "urn:smsvmm:problem:timeout")]
    Timeout,
}

impl ProblemKind {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Invalid,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::Conflict,
        Self::Precondition,
        Self::KeyReused,
        Self::TooLarge,
        Self::Host,
        Self::Exhausted,
        Self::TooMany,
        Self::Stopping,
        Self::Timeout,
    ];

    /// The HTTP status that belongs to it.
    pub const fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Unauthenticated => 401,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::Conflict => 409,
            Self::Precondition => 412,
            Self::TooLarge => 413,
            Self::KeyReused => 422,
            Self::TooMany => 429,
            Self::Host => 500,
            Self::Exhausted | Self::Stopping => 503,
            Self::Timeout => 504,
        }
    }

    /// A short text for people.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Invalid => "the request is invalid",
            Self::Unauthenticated => "it is not known who asks",
            Self::Forbidden => "not permitted",
            Self::NotFound => "no such object",
            Self::MethodNotAllowed => "the object does not support this method",
            Self::Conflict => "not possible in the present state",
            Self::Precondition => "what was said must be so is not",
            Self::KeyReused => "the key was used for another request",
            Self::TooLarge => "the request is too large",
            Self::TooMany => "too many attempts",
            Self::Host => "the host refused",
            Self::Exhausted => "a resource is used up",
            Self::Stopping => "the machine is stopping",
            Self::Timeout => "no answer in time",
        }
    }
}

/// A refused or failed operation. Made with [`Problem::new`], refined with [`Problem::about`] and [`Problem::remedy`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// What kind of problem.
    #[serde(rename = "type")]
    pub kind: ProblemKind,
    /// The kind for people.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened, lower-case, one line.
    pub detail: String,
    /// The object concerned: a device's identifier, a path, a key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What to do about it, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Problem {
    /// A problem of `kind`; `detail` is lower-case and names what happened.
    pub fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self {
            kind,
            title: kind.title().to_owned(),
            status: kind.status(),
            detail: detail.into(),
            object: None,
            remedy: None,
        }
    }

    /// The same problem, which concerns `object`.
    #[must_use]
    pub fn about(mut self, object: impl fmt::Display) -> Self {
        self.object = Some(object.to_string());
        self
    }

    /// The same problem with advice.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Many details name their object already.
        if let Some(object) = self
            .object
            .as_ref()
            .filter(|object| !self.detail.contains(object.as_str()))
        {
            write!(formatter, "{object}: ")?;
        }
        formatter.write_str(&self.detail)?;
        if let Some(remedy) = &self.remedy {
            write!(formatter, "; {remedy}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_json_as_rfc_9457_has_it() {
        let problem = Problem::new(ProblemKind::NotFound, "the machine has no such disk")
            .about("disk7")
            .remedy("`smsvmm vm status` lists them");
        let json = serde_json::to_value(&problem).unwrap();
        assert_eq!(json["type"], "urn:smsvmm:problem:not-found");
        assert_eq!(json["status"], 404);
        assert_eq!(serde_json::from_value::<Problem>(json).unwrap(), problem);
        assert_eq!(
            problem.to_string(),
            "disk7: the machine has no such disk; `smsvmm vm status` lists them"
        );
        let problem = Problem::new(ProblemKind::Host, "cannot open disk7").about("disk7");
        assert_eq!(problem.to_string(), "cannot open disk7");
    }
}
