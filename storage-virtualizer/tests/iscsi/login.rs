//! Logins: stages, keys, CHAP, who may and who may not, discovery.

use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use storage_virtualizer::iscsi::{Access, Chap, Secret};

use crate::Served;
use crate::initiator::{HOST, Initiator, Login, TARGET, pairs, text};

const SECRET: &str = "a secret of the host";
const OTHER: &str = "a secret of the target";

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes().to_vec()).unwrap()
}

fn with_chap() -> Served {
    Served::with(|options| {
        options.targets[0].access = vec![Access {
            initiator: None,
            luns: None,
            chap: Some(Chap {
                user: "user".to_owned(),
                secret: secret(SECRET),
                mutual: Some(("target".to_owned(), secret(OTHER))),
            }),
        }];
    })
}

fn hex(bytes: &[u8]) -> String {
    format!(
        "0x{}",
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    )
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.strip_prefix("0x").unwrap();
    (0..digits.len() / 2)
        .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).unwrap())
        .collect()
}

fn response(identifier: u8, secret: &str, challenge: &[u8]) -> String {
    hex(digest(
        &SHA256,
        &[&[identifier][..], secret.as_bytes(), challenge].concat(),
    )
    .as_ref())
}

fn status(answer: &crate::initiator::Pdu) -> u16 {
    u16::from_be_bytes([answer.head[36], answer.head[37]])
}

/// The security stage up to the question; identifier and challenge.
fn question(initiator: &mut Initiator, login: &Login) -> (u8, Vec<u8>) {
    let first = text(&[
        ("InitiatorName", HOST),
        ("TargetName", TARGET),
        ("AuthMethod", "CHAP,None"),
    ]);
    let answer = initiator.login_step(login, 0x81, &first);
    assert_eq!(
        (status(&answer), answer.head[1]),
        (0, 0),
        "not yet to the next stage"
    );
    assert_eq!(initiator.answers["AuthMethod"], "CHAP");
    assert_eq!(initiator.answers["TargetPortalGroupTag"], "1");
    initiator.login_step(login, 0, &text(&[("CHAP_A", "7,5")]));
    assert_eq!(initiator.answers["CHAP_A"], "7");
    let identifier = initiator.answers["CHAP_I"].parse().unwrap();
    (identifier, unhex(&initiator.answers["CHAP_C"]))
}

#[test]
fn chap_lets_in_who_knows_the_secret_and_proves_the_target_too() {
    let served = with_chap();
    let login = Login::default();
    let mut initiator = Initiator::connect(served.address());
    let (identifier, challenge) = question(&mut initiator, &login);
    let proof = response(identifier, SECRET, &challenge);
    let keys = [
        ("CHAP_N", "user"),
        ("CHAP_R", &proof),
        ("CHAP_I", "9"),
        ("CHAP_C", "0x010203"),
    ];
    let answer = initiator.login_step(&login, 0x81, &text(&keys));
    assert_eq!((status(&answer), answer.head[1]), (0, 0x81));
    assert_eq!(initiator.answers["CHAP_N"], "target");
    assert_eq!(initiator.answers["CHAP_R"], response(9, OTHER, &[1, 2, 3]));
    let answer = initiator.login_step(&login, 0x87, &text(&[("HeaderDigest", "CRC32C,None")]));
    assert_eq!(initiator.finish_login(&login, &answer), 0);
    initiator.settle(0);
}

#[test]
fn who_does_not_know_the_secret_or_leaves_it_out_is_refused() {
    let served = with_chap();
    let login = Login::default();
    type Keys = Vec<(&'static str, String)>;
    let refused = |make: &dyn Fn(u8, &[u8]) -> Keys| {
        let mut initiator = Initiator::connect(served.address());
        let (identifier, challenge) = question(&mut initiator, &login);
        let keys = make(identifier, &challenge);
        let keys: Vec<(&str, &str)> = keys.iter().map(|(key, value)| (*key, value.as_str())).collect();
        let answer = initiator.login_step(&login, 0x81, &text(&keys));
        assert_eq!(status(&answer), 0x0201);
        assert!(initiator.is_gone());
    };
    let named = |proof: String| vec![("CHAP_N", "user".to_owned()), ("CHAP_R", proof)];
    refused(&|identifier, challenge| named(response(identifier, "another secret", challenge)));
    refused(&|identifier, challenge| named(response(identifier.wrapping_add(1), SECRET, challenge)));
    refused(&|identifier, challenge| vec![("CHAP_R", response(identifier, SECRET, challenge))]);
    // Our own question back, so that the target answers it.
    refused(&|identifier, challenge| {
        let mut keys = named(response(identifier, SECRET, challenge));
        keys.extend([("CHAP_I", identifier.to_string()), ("CHAP_C", hex(challenge))]);
        keys
    });
    for (flags, auth) in [(0x81, "None"), (0x81, "KRB5")] {
        let mut initiator = Initiator::connect(served.address());
        let first = text(&[
            ("InitiatorName", HOST),
            ("TargetName", TARGET),
            ("AuthMethod", auth),
        ]);
        assert_eq!(
            status(&initiator.login_step(&login, flags, &first)),
            0x0201,
            "{auth}"
        );
    }
    // Past the security stage, and from it into the full feature phase.
    assert_eq!(Initiator::connect(served.address()).log_in(&login), 0x0201);
    let mut initiator = Initiator::connect(served.address());
    let first = text(&[("InitiatorName", HOST), ("TargetName", TARGET)]);
    let answer = initiator.login_step(&login, 0x83, &first);
    assert_eq!((status(&answer), answer.head[1] & 0x80), (0, 0));
}

#[test]
fn a_login_that_is_wrong_is_refused_with_the_reason() {
    let served = Served::start();
    let login = Login::default();
    let named = [("InitiatorName", HOST), ("TargetName", TARGET)];
    for (flags, keys, expected) in [
        (0x87, &named[1..], 0x0207),
        (0x87, &named[..1], 0x0207),
        (0x87, &[("InitiatorName", "nobody"), named[1]], 0x0200),
        (
            0x87,
            &[named[0], ("TargetName", "iqn.2026-11.org.example:other")],
            0x0203,
        ),
        (0x87, &[named[0], ("SessionType", "Odd")], 0x0209),
        (
            0x87,
            &[
                named[0],
                named[1],
                ("ImmediateData", "No"),
                ("ImmediateData", "Yes"),
            ],
            0x0200,
        ),
        (0x87, &[named[0], named[1], ("CHAP_A", "5")], 0x0200),
        // Backwards, into a stage that does not exist, on and on at once.
        (0x84, &named, 0x0200),
        (0x86, &named, 0x0200),
        (0xc7, &named, 0x0200),
        (0x88, &named, 0x0200),
    ] {
        let mut initiator = Initiator::connect(served.address());
        let answer = initiator.login_step(&login, flags, &text(keys));
        assert_eq!(status(&answer), expected, "{flags:#x} {keys:?}");
        assert!(initiator.is_gone());
    }
    let mut initiator = Initiator::connect(served.address());
    let mut request = crate::initiator::head(0x43, 0x87, 0);
    request[3] = 1;
    initiator.send(request, &text(&named));
    assert_eq!(status(&initiator.receive().unwrap()), 0x0205);
    // No such session.
    let joining = Login {
        tsih: 77,
        ..Login::default()
    };
    assert_eq!(Initiator::connect(served.address()).log_in(&joining), 0x020a);
}

#[test]
fn text_may_come_in_pieces_and_goes_on_for_not_so_long() {
    let served = Served::start();
    let login = Login::default();
    let whole = text(&[
        ("InitiatorName", HOST),
        ("TargetName", TARGET),
        ("MaxBurstLength", "8192"),
    ]);
    let mut initiator = Initiator::connect(served.address());
    for piece in whole.chunks(20).take(whole.len().div_ceil(20) - 1) {
        let answer = initiator.login_step(&login, 0x44, piece);
        assert_eq!((status(&answer), answer.data.len()), (0, 0));
    }
    let rest = &whole[(whole.len() - 1) / 20 * 20..];
    let answer = initiator.login_step(&login, 0x87, rest);
    assert_eq!(initiator.finish_login(&login, &answer), 0);
    assert_eq!(initiator.answers["MaxBurstLength"], "8192");
    let mut endless = Initiator::connect(served.address());
    let codes: Vec<u16> = (0..3)
        .map(|_| status(&endless.login_step(&login, 0x44, &[b'a'; 8000])))
        .collect();
    assert_eq!(codes, [0, 0, 0x0200]);
}

#[test]
fn initiators_see_what_is_given_to_them() {
    let served = Served::with(|options| {
        options.targets[0].access = vec![Access {
            initiator: Some(HOST.to_owned()),
            luns: Some([1].into()),
            chap: None,
        }];
    });
    let mut initiator = Initiator::login(served.address(), &Login::default());
    initiator.settle(1);
    assert_eq!(initiator.read(0, &[0; 6], 0).sense, Some((5, 0x25, 0)));
    let mut report = [0; 12];
    (report[0], report[9]) = (0xa0, 64);
    let luns = initiator.read(1, &report, 64);
    assert_eq!((luns.data.len(), luns.residual), (16, -48));
    assert_eq!(luns.data[8..10], [0, 1]);
    let other = Login {
        initiator: "iqn.2026-11.org.example:other".to_owned(),
        ..Login::default()
    };
    assert_eq!(Initiator::connect(served.address()).log_in(&other), 0x0202);
}

#[test]
fn discovery_tells_of_the_target_also_in_small_pieces() {
    let served = Served::start();
    let discovery = Login {
        discovery: true,
        ..Login::default()
    };
    for segment in ["8192", "512"] {
        let mut initiator = Initiator::login(
            served.address(),
            &discovery.clone().key("MaxRecvDataSegmentLength", segment),
        );
        let address = format!("{},1", served.address());
        let expected = vec![
            ("TargetName".to_owned(), TARGET.to_owned()),
            ("TargetAddress".to_owned(), address),
        ];
        assert_eq!(initiator.ask(&text(&[("SendTargets", "All")])), expected);
        assert_eq!(initiator.ask(&text(&[("SendTargets", TARGET)])), expected);
        assert_eq!(initiator.ask(&text(&[("SendTargets", "iqn.2026-11.org:x")])), []);
        // Nothing else can be done in it.
        let request = initiator.command(0, &[0; 6], 0x81, 0);
        initiator.send(request, &[]);
        assert_eq!(initiator.receive().unwrap().opcode(), 0x3f);
        assert_eq!(initiator.log_out(0, 0), 0);
        assert!(initiator.is_gone());
    }
}

#[test]
fn long_answers_are_told_piece_by_piece() {
    // Many portals make an answer of more than 512 bytes.
    let served = Served::with(|options| {
        options.listen = (1..40)
            .map(|number| block_io::ListenAddress::Tcp(([127, 0, 0, number], 0).into()))
            .collect();
    });
    let discovery = Login {
        discovery: true,
        ..Login::default()
    }
    .key("MaxRecvDataSegmentLength", "512");
    let mut initiator = Initiator::login(served.address(), &discovery);
    let told = initiator.ask(&text(&[("SendTargets", "All")]));
    assert_eq!(told.len(), 40);
    assert_eq!(told[39].0, "TargetAddress");
}

#[test]
fn who_does_not_log_in_is_cut_off_and_only_few_may_try_at_once() {
    let served = Served::with(|options| {
        options.login = Duration::from_millis(300);
        options.logins = 4;
    });
    let mut waiting: Vec<Initiator> = (0..20).map(|_| Initiator::connect(served.address())).collect();
    assert!(waiting.iter_mut().all(Initiator::is_gone));
    served.login(&Login::default());
}

#[test]
fn in_the_full_feature_phase_little_is_negotiated() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    let asked = text(&[
        ("MaxBurstLength", "512"),
        ("X-odd", "1"),
        ("MaxRecvDataSegmentLength", "4096"),
    ]);
    let told = initiator.ask(&asked);
    assert_eq!(told, pairs(b"MaxBurstLength=Reject\0X-odd=NotUnderstood\0"));
    let read = initiator.read(0, &crate::initiator::rw16(crate::initiator::READ, 0, 32), 16384);
    assert_eq!((read.status, read.data.len()), (0, 16384));
}
