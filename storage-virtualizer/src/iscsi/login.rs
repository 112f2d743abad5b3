//! The login phase as a machine without I/O (RFC 7143 §6.3, §11.12, §11.13): requests in, answers out, an [`Agreement`] at
//! the end.
//!
//! ```text
//!   first request ──► who is it, what does it want ──► security: None, or CHAP ──► operational: keys ──► full feature phase
//!                          │                                  │                          ▲
//!                          └── no such target, no access      └── may be left out where nothing is to be proved
//! ```

use super::access::{self, Access};
use super::chap::{Algorithm, Question, Reply};
use super::keys::{Context, OUR_SEGMENT, Parameters};
use super::options::IscsiTarget;
use super::pdu::{CONTINUE, FINAL, Head};
use super::text::{self, Text};

/// Text that one negotiation step may have.
const LONGEST_TEXT: usize = 16 << 10;
/// Requests of a login.
const MOST_REQUESTS: u32 = 64;

/// Stages (§11.12.3).
const SECURITY: u8 = 0;
const OPERATIONAL: u8 = 1;
const FULL_FEATURE: u8 = 3;

/// Classes and details of a status (§11.13.5).
pub(super) mod status {
    pub(crate) const SUCCESS: u16 = 0x0000;
    pub(crate) const INITIATOR_ERROR: u16 = 0x0200;
    pub(crate) const AUTHENTICATION: u16 = 0x0201;
    pub(crate) const FORBIDDEN: u16 = 0x0202;
    pub(crate) const NOT_FOUND: u16 = 0x0203;
    pub(crate) const VERSION: u16 = 0x0205;
    pub(crate) const TOO_MANY_CONNECTIONS: u16 = 0x0206;
    pub(crate) const MISSING: u16 = 0x0207;
    pub(crate) const SESSION_TYPE: u16 = 0x0209;
    pub(crate) const NO_SESSION: u16 = 0x020a;
    pub(crate) const INVALID: u16 = 0x020b;
    pub(crate) const TARGET_ERROR: u16 = 0x0300;
    pub(crate) const UNAVAILABLE: u16 = 0x0301;
    pub(crate) const NO_RESOURCES: u16 = 0x0302;
}

/// What a login is measured against.
pub(super) trait Rules {
    fn targets(&self) -> &[IscsiTarget];
    /// What a session that exists with this target has agreed on.
    fn session(&self, target: usize, initiator: &str, isid: [u8; 6], tsih: u16) -> Option<Parameters>;
}

/// What the first request says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct First {
    pub(super) isid: [u8; 6],
    pub(super) tsih: u16,
    pub(super) cid: u16,
    pub(super) command_number: u32,
}

impl First {
    fn of(head: &Head) -> Self {
        let mut isid = [0; 6];
        isid.copy_from_slice(&head.0[8..14]);
        Self {
            isid,
            tsih: head.u16(14),
            cid: head.u16(20),
            command_number: head.command_number(),
        }
    }
}

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Agreement {
    pub(super) first: First,
    pub(super) initiator: String,
    pub(super) is_discovery: bool,
    /// The target; of a discovery, the one whose access it was measured against.
    pub(super) target: usize,
    pub(super) access: Access,
    pub(super) parameters: Parameters,
}

/// An answer to a login request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u16,
    /// Byte 1 of the response: transit bit and stages.
    pub(super) flags: u8,
    pub(super) text: Text,
    /// The login has ended with this; the response is yet to be sent, with the session's handle.
    pub(super) agreement: Option<Box<Agreement>>,
}

/// Why a login is refused: status, and words for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal(pub(super) u16, pub(super) &'static str);

#[derive(Debug)]
enum Auth {
    /// Nothing was said of it.
    Open,
    /// CHAP was chosen; the initiator is to offer algorithms.
    Chosen,
    Asked(Box<Question>),
    Done,
}

/// Who logs in, as its first request says.
#[derive(Debug)]
struct Who {
    initiator: String,
    is_discovery: bool,
    target: usize,
    access: Access,
}

#[derive(Debug)]
pub(super) struct Login {
    stage: u8,
    first: Option<First>,
    who: Option<Who>,
    auth: Auth,
    text: Vec<u8>,
    parameters: Parameters,
    /// Keys that were negotiated.
    seen: Vec<String>,
    requests: u32,
    declared: bool,
}

impl Login {
    pub(super) fn new() -> Self {
        Self {
            stage: SECURITY,
            first: None,
            who: None,
            auth: Auth::Open,
            text: Vec::new(),
            parameters: Parameters::default(),
            seen: Vec::new(),
            requests: 0,
            declared: false,
        }
    }

    /// Who it says it is, for the log.
    pub(super) fn initiator(&self) -> &str {
        self.who.as_ref().map_or("an initiator", |who| &who.initiator)
    }

    /// Takes a login request.
    ///
    /// # Errors
    /// The login has failed; the connection ends when this was told.
    pub(super) fn step(&mut self, rules: &impl Rules, head: &Head, data: &[u8]) -> Result<Answer, Refusal> {
        let flags = head.0[1];
        let (transit, goes_on) = (flags & FINAL != 0, flags & CONTINUE != 0);
        let (current, next) = (flags >> 2 & 3, flags & 3);
        self.check_head(head, current)?;
        if transit && (goes_on || next <= current || next == 2) {
            return Err(Refusal(status::INITIATOR_ERROR, "an impossible change of stages"));
        }
        if self.text.len() + data.len() > LONGEST_TEXT {
            return Err(Refusal(status::INITIATOR_ERROR, "endless text"));
        }
        self.text.extend(data);
        if goes_on {
            return Ok(self.answer(current << 2, Text::default()));
        }
        let gathered = std::mem::take(&mut self.text);
        let pairs =
            text::parse(&gathered).map_err(|malformed| Refusal(status::INITIATOR_ERROR, malformed.0))?;
        for (key, _) in &pairs {
            if self.seen.iter().any(|seen| seen == key) {
                return Err(Refusal(status::INITIATOR_ERROR, "a key is negotiated twice"));
            }
            self.seen.push((*key).to_owned());
        }
        let mut answer = Text::default();
        if self.who.is_none() {
            self.identify(rules, head, &pairs, &mut answer)?;
        }
        let pairs = pairs
            .iter()
            .copied()
            .filter(|(key, _)| !matches!(*key, "InitiatorName" | "TargetName" | "SessionType"));
        let may_go = if current == SECURITY {
            self.secure(pairs, &mut answer)?
        } else {
            self.operate(pairs, &mut answer)?;
            true
        };
        if !(transit && may_go) {
            return Ok(self.answer(current << 2, answer));
        }
        self.stage = next;
        let mut answer = self.answer(FINAL | current << 2 | next, answer);
        if next == FULL_FEATURE {
            answer.agreement = Some(Box::new(self.agree()?));
        }
        Ok(answer)
    }

    fn answer(&self, flags: u8, text: Text) -> Answer {
        Answer {
            status: status::SUCCESS,
            flags,
            text,
            agreement: None,
        }
    }

    /// What must be the same in all requests.
    fn check_head(&mut self, head: &Head, current: u8) -> Result<(), Refusal> {
        self.requests += 1;
        if self.requests > MOST_REQUESTS {
            return Err(Refusal(status::INITIATOR_ERROR, "a login without end"));
        }
        if head.0[3] > 0 {
            return Err(Refusal(status::VERSION, "a version that is not supported"));
        }
        let now = First::of(head);
        match self.first {
            None => {
                if current != SECURITY && current != OPERATIONAL {
                    return Err(Refusal(status::INITIATOR_ERROR, "an impossible stage"));
                }
                self.stage = current;
                self.first = Some(now);
            }
            Some(first) => {
                let same = (first.isid, first.tsih, first.cid) == (now.isid, now.tsih, now.cid);
                if !same || current != self.stage {
                    return Err(Refusal(status::INVALID, "a login that changes its mind"));
                }
            }
        }
        Ok(())
    }

    /// Who it is and what it wants, from the first text.
    fn identify(
        &mut self,
        rules: &impl Rules,
        head: &Head,
        pairs: &[(&str, &str)],
        answer: &mut Text,
    ) -> Result<(), Refusal> {
        let value = |name: &str| {
            pairs
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| *value)
        };
        let initiator = value("InitiatorName").ok_or(Refusal(status::MISSING, "no InitiatorName"))?;
        let initiator = initiator.to_ascii_lowercase();
        if access::check_name(&initiator).is_err() {
            return Err(Refusal(
                status::INITIATOR_ERROR,
                "the initiator's name is not an iSCSI name",
            ));
        }
        let is_discovery = match value("SessionType") {
            None | Some("Normal") => false,
            Some("Discovery") => true,
            Some(_) => {
                return Err(Refusal(
                    status::SESSION_TYPE,
                    "a type of session that does not exist",
                ));
            }
        };
        let targets = rules.targets();
        let may = |target: &IscsiTarget| access::find(&target.access, &initiator).is_some();
        let target = match value("TargetName") {
            None if !is_discovery => return Err(Refusal(status::MISSING, "no TargetName")),
            // Any that it may use.
            None => targets.iter().position(may).unwrap_or(0),
            Some(name) => targets
                .iter()
                .position(|target| target.is(name))
                .ok_or(Refusal(status::NOT_FOUND, "a target that is not here"))?,
        };
        let own = targets
            .get(target)
            .ok_or(Refusal(status::NOT_FOUND, "there is no target"))?;
        let access = access::find(&own.access, &initiator).ok_or(Refusal(
            status::FORBIDDEN,
            "nothing is shared with this initiator",
        ))?;
        let first = First::of(head);
        if first.tsih != 0 {
            let known = rules.session(target, &initiator, first.isid, first.tsih);
            let known = known.ok_or(Refusal(status::NO_SESSION, "a session that does not exist"))?;
            self.parameters = Parameters::join(&known);
        }
        if !is_discovery {
            answer.put("TargetPortalGroupTag", &super::session::PORTAL_GROUP.to_string());
            if !own.alias.is_empty() {
                answer.put("TargetAlias", &own.alias);
            }
        }
        self.who = Some(Who {
            initiator,
            is_discovery,
            target,
            access: access.clone(),
        });
        Ok(())
    }

    /// The security stage. Whether it may end.
    fn secure<'a>(
        &mut self,
        pairs: impl Iterator<Item = (&'a str, &'a str)>,
        answer: &mut Text,
    ) -> Result<bool, Refusal> {
        let failed = |why| Refusal(status::AUTHENTICATION, why);
        let chap = self.who.as_ref().and_then(|who| who.access.chap.as_ref());
        let (mut reply, mut algorithms) = (Reply::default(), None);
        for (key, value) in pairs {
            match key {
                "AuthMethod" => {
                    let wanted = if chap.is_some() { "CHAP" } else { "None" };
                    if !value.split(',').any(|method| method == wanted) {
                        return Err(failed(if chap.is_some() {
                            "the initiator does not offer CHAP"
                        } else {
                            "the initiator wants to prove who it is, and there is no secret for it"
                        }));
                    }
                    answer.put("AuthMethod", wanted);
                    self.auth = if chap.is_some() { Auth::Chosen } else { Auth::Done };
                }
                "CHAP_A" => algorithms = Some(value),
                "CHAP_N" => reply.name = Some(value),
                "CHAP_R" => reply.response = Some(value),
                "CHAP_I" => reply.identifier = Some(value),
                "CHAP_C" => reply.challenge = Some(value),
                "InitiatorAlias" => {}
                _ => {
                    return Err(Refusal(
                        status::INITIATOR_ERROR,
                        "an operational key in the security stage",
                    ));
                }
            }
        }
        let Some(chap) = chap else {
            self.auth = Auth::Done;
            return Ok(true);
        };
        match (&self.auth, algorithms) {
            (Auth::Chosen, Some(list)) => {
                let algorithm =
                    Algorithm::choose(list).ok_or(failed("no algorithm of CHAP that is known here"))?;
                let question = Question::new(algorithm)
                    .ok_or(Refusal(status::TARGET_ERROR, "the host has no random numbers"))?;
                question.put(answer);
                self.auth = Auth::Asked(Box::new(question));
            }
            (Auth::Asked(question), None) => {
                let said = question.check(&reply, chap).map_err(failed)?;
                answer.0.extend(said.0);
                self.auth = Auth::Done;
            }
            (Auth::Open | Auth::Chosen, None) if reply.name.is_none() && reply.response.is_none() => {}
            (Auth::Done, None) if reply.name.is_none() && reply.response.is_none() => {}
            _ => return Err(failed("CHAP in the wrong order")),
        }
        Ok(matches!(self.auth, Auth::Done))
    }

    fn operate<'a>(
        &mut self,
        pairs: impl Iterator<Item = (&'a str, &'a str)>,
        answer: &mut Text,
    ) -> Result<(), Refusal> {
        let Some(who) = &self.who else {
            return Err(Refusal(status::MISSING, "no InitiatorName"));
        };
        if who.access.chap.is_some() && !matches!(self.auth, Auth::Done) {
            return Err(Refusal(
                status::AUTHENTICATION,
                "the initiator has not proved who it is",
            ));
        }
        let context = match self.first {
            _ if who.is_discovery => Context::Discovery,
            Some(First { tsih: 1.., .. }) => Context::Joining,
            _ => Context::Leading,
        };
        for (key, value) in pairs {
            if matches!(key, "AuthMethod") || key.starts_with("CHAP_") {
                return Err(Refusal(
                    status::INITIATOR_ERROR,
                    "a security key in the operational stage",
                ));
            }
            if let Some(result) = self.parameters.negotiate(context, key, value) {
                answer.put(key, &result);
            }
        }
        if !self.declared {
            self.declared = true;
            self.parameters.receive_segment = OUR_SEGMENT;
            answer.put("MaxRecvDataSegmentLength", &OUR_SEGMENT.to_string());
        }
        Ok(())
    }

    fn agree(&mut self) -> Result<Agreement, Refusal> {
        self.parameters.settle();
        let (Some(first), Some(who)) = (self.first, self.who.take()) else {
            return Err(Refusal(status::MISSING, "no InitiatorName"));
        };
        Ok(Agreement {
            first,
            initiator: who.initiator,
            is_discovery: who.is_discovery,
            target: who.target,
            access: who.access,
            parameters: self.parameters,
        })
    }
}
