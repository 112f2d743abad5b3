//! Options and their answers.

use super::*;

struct Two(bool);

impl Catalogue for Two {
    fn all(&self) -> Vec<usize> {
        if self.0 { vec![0, 1] } else { vec![0] }
    }

    fn offer(&self, index: usize) -> Option<Offer> {
        Some(Offer {
            name: ["disk", "other"][index].to_owned(),
            description: ["a disk", ""][index].to_owned(),
            size: 1 << 20,
            minimum_block: 512,
            preferred_block: 4096,
            read_only: index == 1,
            zeroes_fast: true,
            snapshots: vec!["monday".to_owned()],
        })
    }
}

fn kinds(answer: &Answer) -> Vec<u32> {
    let mut kinds = Vec::new();
    let mut rest = &answer.bytes[..];
    while !rest.is_empty() {
        assert_eq!(rest[..8], OPTION_REPLY_MAGIC.to_be_bytes());
        kinds.push(u32_at(rest, 12).unwrap());
        rest = &rest[20 + u32_at(rest, 16).unwrap() as usize..];
    }
    kinds
}

fn go(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = length(name.as_bytes()).to_vec();
    data.extend(name.as_bytes());
    data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
    for kind in wanted {
        data.extend(kind.to_be_bytes());
    }
    data
}

fn meta(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = length(name.as_bytes()).to_vec();
    data.extend(name.as_bytes());
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend(length(query.as_bytes()));
        data.extend(query.as_bytes());
    }
    data
}

#[test]
fn an_export_is_chosen_by_name_and_the_only_one_by_no_name() {
    let mut negotiation = Negotiation::new(TlsMode::Off, true);
    let answer = negotiation.option(
        &Two(true),
        option::GO,
        &go("other", &[info::NAME, info::DESCRIPTION]),
    );
    assert_eq!(
        kinds(&answer),
        [reply::INFO, reply::INFO, reply::INFO, reply::ACK]
    );
    let Next::Transmit(agreement) = answer.next else {
        panic!("no transmission")
    };
    assert_eq!((agreement.export, agreement.structured), (1, false));
    for (catalogue, known) in [(Two(true), false), (Two(false), true)] {
        let answer = negotiation.option(&catalogue, option::INFO, &go("", &[]));
        let expected: &[u32] = if known {
            &[reply::INFO, reply::INFO, reply::ACK]
        } else {
            &[reply::UNKNOWN]
        };
        assert_eq!(kinds(&answer), expected);
        assert_eq!(answer.next, Next::Option);
    }
}

#[test]
fn the_old_way_has_its_own_answer_with_and_without_zeroes() {
    for (no_zeroes, expected) in [(true, 10), (false, 134)] {
        let answer =
            Negotiation::new(TlsMode::Allowed, no_zeroes).option(&Two(true), option::EXPORT_NAME, b"disk");
        assert_eq!(answer.bytes.len(), expected);
        assert!(matches!(answer.next, Next::Transmit(_)));
    }
    for wrong in [&b"nothing"[..], b"\xff\xfe"] {
        let answer = Negotiation::new(TlsMode::Off, true).option(&Two(true), option::EXPORT_NAME, wrong);
        assert_eq!((answer.bytes.len(), answer.next), (0, Next::Close));
    }
}

#[test]
fn contexts_are_listed_by_prefix_and_set_by_their_whole_names() {
    let mut negotiation = Negotiation::new(TlsMode::Off, true);
    let list = |negotiation: &mut Negotiation, option, queries: &[&str]| {
        kinds(&negotiation.option(&Two(true), option, &meta("disk", queries))).len() - 1
    };
    let early = negotiation.option(
        &Two(true),
        option::SET_META_CONTEXT,
        &meta("disk", &["base:allocation"]),
    );
    assert_eq!(kinds(&early), [reply::INVALID]);
    negotiation.option(&Two(true), option::STRUCTURED_REPLY, &[]);
    assert_eq!(list(&mut negotiation, option::LIST_META_CONTEXT, &[]), 3);
    assert_eq!(list(&mut negotiation, option::LIST_META_CONTEXT, &["base:"]), 1);
    assert_eq!(
        list(
            &mut negotiation,
            option::LIST_META_CONTEXT,
            &["qemu:dirty-bitmap:"]
        ),
        1
    );
    assert_eq!(list(&mut negotiation, option::LIST_META_CONTEXT, &["x-none:"]), 0);
    assert_eq!(list(&mut negotiation, option::SET_META_CONTEXT, &["base:"]), 0);
    assert_eq!(list(&mut negotiation, option::SET_META_CONTEXT, &[]), 0);
    let queries = ["qemu:dirty-bitmap:monday", "base:allocation"];
    assert_eq!(list(&mut negotiation, option::SET_META_CONTEXT, &queries), 2);
    // Contexts are those of one export.
    let Next::Transmit(other) = negotiation
        .clone()
        .option(&Two(true), option::GO, &go("other", &[]))
        .next
    else {
        panic!("no transmission")
    };
    assert!(other.contexts.is_empty());
    let Next::Transmit(agreement) = negotiation.option(&Two(true), option::GO, &go("disk", &[])).next else {
        panic!("no transmission")
    };
    assert_eq!(
        agreement.contexts,
        [(1, Context::Allocation), (2, Context::Changed(0))]
    );
}

#[test]
fn where_tls_is_required_nothing_else_is_answered_before() {
    let mut negotiation = Negotiation::new(TlsMode::Required, true);
    for option in [option::LIST, option::GO, option::STRUCTURED_REPLY, 77] {
        assert_eq!(
            kinds(&negotiation.option(&Two(true), option, &[])),
            [reply::TLS_REQUIRED]
        );
    }
    assert_eq!(
        negotiation.option(&Two(true), option::EXPORT_NAME, b"disk").next,
        Next::Close
    );
    let answer = negotiation.option(&Two(true), option::STARTTLS, &[]);
    assert_eq!((kinds(&answer), answer.next), (vec![reply::ACK], Next::StartTls));
    negotiation.encrypted();
    assert_eq!(
        kinds(&negotiation.option(&Two(true), option::STARTTLS, &[])),
        [reply::INVALID]
    );
    assert_eq!(
        kinds(&negotiation.option(&Two(true), option::LIST, &[])),
        [reply::SERVER, reply::SERVER, reply::ACK]
    );
}

#[test]
fn what_was_said_before_tls_is_forgotten() {
    let mut negotiation = Negotiation::new(TlsMode::Allowed, true);
    negotiation.option(&Two(true), option::STRUCTURED_REPLY, &[]);
    negotiation.encrypted();
    let Next::Transmit(agreement) = negotiation.option(&Two(true), option::GO, &go("disk", &[])).next else {
        panic!("no transmission")
    };
    assert!(!agreement.structured);
}

#[test]
fn rubbish_is_answered_with_errors() {
    let mut negotiation = Negotiation::new(TlsMode::Off, true);
    negotiation.option(&Two(true), option::EXTENDED_HEADERS, &[]);
    for (option, data) in [
        (option::LIST, &b"x"[..]),
        (option::GO, b""),
        (option::GO, b"\0\0\0\x04disk\0\x02\0\0"),
        (option::GO, b"\xff\xff\xff\xffdisk\0\0"),
        (option::INFO, b"\0\0\0\x01\xff\0\0"),
        (option::SET_META_CONTEXT, b"\0\0\0\x04disk\xff\xff\xff\xff"),
        (option::LIST_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\0x"),
        (option::EXTENDED_HEADERS, b""),
        (option::STRUCTURED_REPLY, b""),
    ] {
        assert_eq!(
            kinds(&negotiation.option(&Two(true), option, data)),
            [reply::INVALID]
        );
    }
    assert_eq!(
        kinds(&negotiation.option(&Two(true), 4, &[])),
        [reply::UNSUPPORTED]
    );
    assert_eq!(
        kinds(&negotiation.option(&Two(true), option::STARTTLS, &[])),
        [reply::POLICY]
    );
    assert_eq!(
        negotiation.option(&Two(true), option::ABORT, &[]).next,
        Next::Close
    );
}
