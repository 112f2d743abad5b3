//! Operational parameters and how they are negotiated (RFC 7143 §13).

use super::pdu::Digests;
use super::text;

/// Data of a PDU at most before something else was declared (§13.12).
pub(super) const DEFAULT_SEGMENT: u32 = 8192;
/// What this side takes in one PDU.
pub(super) const OUR_SEGMENT: u32 = 256 << 10;
/// The most that 24 bits say of the length of data (§13.12 to §13.14).
const LONGEST: u32 = (1 << 24) - 1;
/// The most data that may come unasked for.
const OUR_FIRST_BURST: u32 = 256 << 10;
/// The most data of one sequence.
const OUR_BURST: u32 = 4 << 20;
/// Requests for data of one command at a time.
const OUR_READY_TO_TRANSFER: u32 = 8;
/// Connections of one session.
const OUR_CONNECTIONS: u32 = 8;

/// What a connection and its session have agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parameters {
    // Of the connection.
    pub(super) digests: Digests,
    /// Bytes of data in a PDU to the initiator, at most.
    pub(super) send_segment: u32,
    /// Bytes of data in a PDU from the initiator, at most.
    pub(super) receive_segment: u32,
    // Of the session.
    pub(super) connections: u32,
    pub(super) initial_r2t: bool,
    pub(super) immediate_data: bool,
    pub(super) burst: u32,
    pub(super) first_burst: u32,
    pub(super) ready_to_transfer: u32,
    pub(super) time_to_wait: u32,
    pub(super) time_to_retain: u32,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            digests: Digests::default(),
            send_segment: DEFAULT_SEGMENT,
            receive_segment: DEFAULT_SEGMENT,
            connections: 1,
            initial_r2t: true,
            immediate_data: true,
            burst: 262_144,
            first_burst: 65_536,
            ready_to_transfer: 1,
            time_to_wait: 2,
            time_to_retain: 0,
        }
    }
}

/// How a value comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    /// The first of the initiator's list that is one of these.
    List(&'static [&'static str]),
    /// The smaller one, in this range; ours.
    Minimum(u32, u32, u32),
    /// The larger one, in this range; ours.
    Maximum(u32, u32, u32),
    /// Yes if both say so; ours.
    And(bool),
    /// Yes if one says so; ours.
    Or(bool),
    /// The initiator says it, in this range, and gets no answer.
    Declared(u32, u32),
    /// Text that the initiator says, and that is not used.
    Told,
}

/// For what a key counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// A connection, of any session.
    Connection,
    /// A session, by its first connection; in a discovery session it has no meaning.
    Session,
    /// The same, with a meaning in discovery sessions.
    AnySession,
}

/// A result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Value {
    Number(u32),
    Bool(bool),
    /// The place in the list.
    Choice(usize),
}

struct Key {
    name: &'static str,
    rule: Rule,
    scope: Scope,
    set: fn(&mut Parameters, Value),
    /// What a session has that exists already.
    get: fn(&Parameters) -> Value,
}

fn number(value: Value) -> u32 {
    match value {
        Value::Number(number) => number,
        Value::Bool(bool) => bool.into(),
        Value::Choice(choice) => u32::try_from(choice).unwrap_or(0),
    }
}

macro_rules! keys {
    ($($name:literal, $scope:ident, $rule:expr, $field:ident $(. $inner:ident)?, $kind:ident;)*) => {
        static KEYS: &[Key] = &[$(Key {
            name: $name,
            rule: $rule,
            scope: Scope::$scope,
            set: |parameters, value| keys!(@set $kind, parameters.$field $(. $inner)?, value),
            get: |parameters| keys!(@get $kind, parameters.$field $(. $inner)?),
        },)*];
    };
    (@set Number, $place:expr, $value:expr) => { $place = number($value) };
    (@set Bool, $place:expr, $value:expr) => { $place = $value == Value::Bool(true) };
    (@set Choice, $place:expr, $value:expr) => { $place = $value == Value::Choice(0) };
    (@get Number, $place:expr) => { Value::Number($place) };
    (@get Bool, $place:expr) => { Value::Bool($place) };
    (@get Choice, $place:expr) => { Value::Choice(usize::from(!$place)) };
}

const DIGESTS: Rule = Rule::List(&["CRC32C", "None"]);

keys! {
    "HeaderDigest", Connection, DIGESTS, digests.header, Choice;
    "DataDigest", Connection, DIGESTS, digests.data, Choice;
    "MaxRecvDataSegmentLength", Connection, Rule::Declared(512, LONGEST), send_segment, Number;
    "MaxConnections", Session, Rule::Minimum(1, 65_535, OUR_CONNECTIONS), connections, Number;
    "InitialR2T", Session, Rule::Or(false), initial_r2t, Bool;
    "ImmediateData", Session, Rule::And(true), immediate_data, Bool;
    "MaxBurstLength", Session, Rule::Minimum(512, LONGEST, OUR_BURST), burst, Number;
    "FirstBurstLength", Session, Rule::Minimum(512, LONGEST, OUR_FIRST_BURST), first_burst, Number;
    "MaxOutstandingR2T", Session, Rule::Minimum(1, 65_535, OUR_READY_TO_TRANSFER), ready_to_transfer, Number;
    "DefaultTime2Wait", AnySession, Rule::Maximum(0, 3600, 0), time_to_wait, Number;
    "DefaultTime2Retain", AnySession, Rule::Minimum(0, 3600, 0), time_to_retain, Number;
}

/// Keys whose result is always the same.
static FIXED: &[(&str, Rule, Scope)] = &[
    ("DataPDUInOrder", Rule::Or(true), Scope::Session),
    ("DataSequenceInOrder", Rule::Or(true), Scope::Session),
    ("ErrorRecoveryLevel", Rule::Minimum(0, 2, 0), Scope::AnySession),
    ("TaskReporting", Rule::List(&["RFC3720"]), Scope::Session),
    ("iSCSIProtocolLevel", Rule::Minimum(0, 31, 1), Scope::AnySession),
    // Of RFC 3720; markers are not used any more (§13.25).
    ("IFMarker", Rule::And(false), Scope::Connection),
    ("OFMarker", Rule::And(false), Scope::Connection),
    ("InitiatorAlias", Rule::Told, Scope::AnySession),
];

/// The answer to a key that is not for the full feature phase.
pub(super) fn outside_login(name: &str) -> String {
    let known = KEYS.iter().any(|key| key.name == name) || FIXED.iter().any(|(fixed, ..)| *fixed == name);
    if known { "Reject" } else { "NotUnderstood" }.to_owned()
}

/// Names of all keys that are negotiated here.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    KEYS.iter()
        .map(|key| key.name)
        .chain(FIXED.iter().map(|(name, ..)| *name))
}

/// What kind of session a key is negotiated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// The first connection of a normal session.
    Leading,
    /// A further one.
    Joining,
    /// A discovery session.
    Discovery,
}

fn yes(value: bool) -> &'static str {
    if value { "Yes" } else { "No" }
}

/// The result of `rule` for what the initiator offers, and the answer if there is one. `Err`: the offer is impossible.
fn decide(rule: Rule, offer: &str) -> Result<(Value, Option<String>), ()> {
    let ranged = |from: u32, to: u32| {
        let number = text::number(offer).ok_or(())?;
        if (from..=to).contains(&number) {
            Ok(number)
        } else {
            Err(())
        }
    };
    let flag = || match offer {
        "Yes" => Ok(true),
        "No" => Ok(false),
        _ => Err(()),
    };
    let told = |number: u32| Ok((Value::Number(number), Some(number.to_string())));
    let said = |value: bool| Ok((Value::Bool(value), Some(yes(value).to_owned())));
    match rule {
        Rule::List(known) => {
            let place = offer
                .split(',')
                .find_map(|item| known.iter().position(|known| *known == item))
                .ok_or(())?;
            Ok((Value::Choice(place), Some(known[place].to_owned())))
        }
        Rule::Minimum(from, to, ours) => told(ranged(from, to)?.min(ours)),
        Rule::Maximum(from, to, ours) => told(ranged(from, to)?.max(ours)),
        Rule::And(ours) => said(flag()? && ours),
        Rule::Or(ours) => said(flag()? || ours),
        Rule::Declared(from, to) => Ok((Value::Number(ranged(from, to)?), None)),
        Rule::Told => Ok((Value::Bool(true), None)),
    }
}

fn shown(rule: Rule, value: Value) -> String {
    match (rule, value) {
        (_, Value::Number(number)) => number.to_string(),
        (_, Value::Bool(value)) => yes(value).to_owned(),
        (Rule::List(known), Value::Choice(place)) => known.get(place).unwrap_or(&"None").to_string(),
        (_, Value::Choice(place)) => place.to_string(),
    }
}

impl Parameters {
    /// Negotiates one key; returns the answer, if it gets one.
    pub(super) fn negotiate(&mut self, context: Context, name: &str, offer: &str) -> Option<String> {
        let refused = || Some("Reject".to_owned());
        if let Some(key) = KEYS.iter().find(|key| key.name == name) {
            if context == Context::Discovery && key.scope == Scope::Session {
                return Some("Irrelevant".to_owned());
            }
            let Ok((value, answer)) = decide(key.rule, offer) else {
                return refused();
            };
            if context == Context::Joining && key.scope != Scope::Connection {
                // The session has it already.
                return Some(shown(key.rule, (key.get)(self)));
            }
            (key.set)(self, value);
            return answer;
        }
        match FIXED.iter().find(|(fixed, ..)| *fixed == name) {
            Some((_, _, Scope::Session)) if context == Context::Discovery => Some("Irrelevant".to_owned()),
            Some((_, rule, _)) => match decide(*rule, offer) {
                Ok((_, answer)) => answer,
                Err(()) => refused(),
            },
            None => Some("NotUnderstood".to_owned()),
        }
    }

    /// The end of the negotiation: what depends on each other (§13.14).
    pub(super) fn settle(&mut self) {
        self.first_burst = self.first_burst.min(self.burst);
    }

    /// Takes over what counts for a session from its first connection.
    pub(super) fn join(session: &Self) -> Self {
        let own = Self::default();
        Self {
            digests: own.digests,
            send_segment: own.send_segment,
            receive_segment: own.receive_segment,
            ..*session
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(context: Context, name: &str, offer: &str) -> (Parameters, Option<String>) {
        let mut parameters = Parameters::default();
        let answer = parameters.negotiate(context, name, offer);
        (parameters, answer)
    }

    #[test]
    fn each_key_has_the_result_that_its_rule_says() {
        for (name, offer, answer) in [
            // §13.1: the first of the initiator's list that the target has.
            ("HeaderDigest", "CRC32C,None", Some("CRC32C")),
            ("HeaderDigest", "None,CRC32C", Some("None")),
            ("DataDigest", "X-sha,CRC32C", Some("CRC32C")),
            ("DataDigest", "X-sha", Some("Reject")),
            // §13.2: minimum.
            ("MaxConnections", "4", Some("4")),
            ("MaxConnections", "65535", Some("8")),
            ("MaxConnections", "0", Some("Reject")),
            // §13.10, §13.11: OR and AND.
            ("InitialR2T", "Yes", Some("Yes")),
            ("InitialR2T", "No", Some("No")),
            ("InitialR2T", "yes", Some("Reject")),
            ("ImmediateData", "Yes", Some("Yes")),
            ("ImmediateData", "No", Some("No")),
            // §13.12: declared.
            ("MaxRecvDataSegmentLength", "262144", None),
            ("MaxRecvDataSegmentLength", "511", Some("Reject")),
            ("MaxRecvDataSegmentLength", "16777216", Some("Reject")),
            // §13.13, §13.14: minimum, from 512 on.
            ("MaxBurstLength", "16776192", Some("4194304")),
            ("MaxBurstLength", "0x10000", Some("65536")),
            ("FirstBurstLength", "65536", Some("65536")),
            ("FirstBurstLength", "100", Some("Reject")),
            // §13.15, §13.16: maximum and minimum; nothing is retained at level 0.
            ("DefaultTime2Wait", "5", Some("5")),
            ("DefaultTime2Wait", "3601", Some("Reject")),
            ("DefaultTime2Retain", "20", Some("0")),
            // §13.17: minimum.
            ("MaxOutstandingR2T", "1", Some("1")),
            ("MaxOutstandingR2T", "16", Some("8")),
            // §13.18, §13.19: OR.
            ("DataPDUInOrder", "No", Some("Yes")),
            ("DataSequenceInOrder", "Yes", Some("Yes")),
            // §13.20: minimum.
            ("ErrorRecoveryLevel", "2", Some("0")),
            ("ErrorRecoveryLevel", "3", Some("Reject")),
            // §13.23, §13.24.
            ("TaskReporting", "FastAbort,RFC3720", Some("RFC3720")),
            ("iSCSIProtocolLevel", "2", Some("1")),
            ("IFMarker", "No", Some("No")),
            ("X-org.example.thing", "1", Some("NotUnderstood")),
        ] {
            let (_, result) = one(Context::Leading, name, offer);
            assert_eq!(result.as_deref(), answer, "{name}={offer}");
        }
    }

    #[test]
    fn results_are_kept_and_refused_offers_change_nothing() {
        let (parameters, _) = one(Context::Leading, "HeaderDigest", "CRC32C");
        assert!(parameters.digests.header && !parameters.digests.data);
        let (parameters, _) = one(Context::Leading, "HeaderDigest", "None");
        assert!(!parameters.digests.header);
        let (parameters, _) = one(Context::Leading, "InitialR2T", "No");
        assert!(!parameters.initial_r2t);
        for name in names() {
            let (parameters, _) = one(Context::Leading, name, "?");
            assert_eq!(parameters, Parameters::default(), "{name}");
        }
        let mut parameters = one(Context::Leading, "MaxBurstLength", "4096").0;
        parameters.settle();
        assert_eq!(parameters.first_burst, 4096);
    }

    #[test]
    fn a_session_is_negotiated_once_and_discovery_has_little_to_negotiate() {
        let mut session = Parameters::default();
        session.negotiate(Context::Leading, "MaxBurstLength", "65536");
        session.negotiate(Context::Leading, "HeaderDigest", "CRC32C");
        let mut joined = Parameters::join(&session);
        assert_eq!((joined.burst, joined.digests.header), (65_536, false));
        let answer = joined.negotiate(Context::Joining, "MaxBurstLength", "512");
        assert_eq!((answer.as_deref(), joined.burst), (Some("65536"), 65_536));
        joined.negotiate(Context::Joining, "DataDigest", "CRC32C");
        assert!(joined.digests.data);
        for (name, answer) in [
            ("MaxConnections", "Irrelevant"),
            ("InitialR2T", "Irrelevant"),
            ("ErrorRecoveryLevel", "0"),
            ("DataPDUInOrder", "Irrelevant"),
            ("HeaderDigest", "Reject"),
        ] {
            let offer = if name == "ErrorRecoveryLevel" { "0" } else { "1" };
            assert_eq!(
                one(Context::Discovery, name, offer).1.as_deref(),
                Some(answer),
                "{name}"
            );
        }
    }
}
