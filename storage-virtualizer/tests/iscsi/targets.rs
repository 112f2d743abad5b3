//! Several targets behind one portal.

use storage_virtualizer::iscsi::{Access, Chap, IscsiTarget, Secret};

use crate::Served;
use crate::initiator::{HOST, Initiator, Login, READ, TARGET, WRITE, rw16, text};

const SECOND: &str = "iqn.2026-11.org.example:second";
const SECRET: &str = "iqn.2026-11.org.example:secret";

/// One for everybody, one for [`HOST`], one for who proves something.
fn served() -> Served {
    Served::with(|options| {
        let mut second = IscsiTarget::open(SECOND);
        second.access[0].initiator = Some(HOST.to_owned());
        second.access[0].luns = Some([0].into());
        let mut secret = IscsiTarget::open(SECRET);
        secret.access = vec![Access {
            chap: Some(Chap {
                user: "user".to_owned(),
                secret: Secret::new(vec![b'x'; 16]).unwrap(),
                mutual: None,
            }),
            ..Access::everybody()
        }];
        options.targets.extend([second, secret]);
    })
}

fn to(target: &'static str) -> Login {
    Login {
        target,
        ..Login::default()
    }
}

fn told(served: &Served, initiator: &str) -> Vec<String> {
    let login = Login {
        discovery: true,
        initiator: initiator.to_owned(),
        ..Login::default()
    };
    let mut initiator = Initiator::login(served.address(), &login);
    let told = initiator.ask(&text(&[("SendTargets", "All")]));
    let names = told.into_iter().filter(|(key, _)| key == "TargetName");
    names.map(|(_, name)| name).collect()
}

#[test]
fn each_is_told_of_the_targets_that_it_may_use() {
    let served = served();
    assert_eq!(told(&served, HOST), [TARGET, SECOND]);
    let other = "iqn.2026-11.org.example:other";
    assert_eq!(told(&served, other), [TARGET]);
    let login = |target| Login {
        initiator: other.to_owned(),
        ..to(target)
    };
    let status = |target| Initiator::connect(served.address()).log_in(&login(target));
    assert_eq!(status(TARGET), 0);
    assert_eq!(status(SECOND), 0x0202);
    // Not without a proof.
    assert_eq!(status(SECRET), 0x0201);
    assert_eq!(status("iqn.2026-11.org.example:none"), 0x0203);
    // In a session with a target there is only that one.
    let mut initiator = served.login(&to(SECOND));
    let told = initiator.ask(&text(&[("SendTargets", "")]));
    assert_eq!(told[0], ("TargetName".to_owned(), SECOND.to_owned()));
    assert_eq!(initiator.ask(&text(&[("SendTargets", TARGET)])), []);
}

#[test]
fn the_same_lun_of_two_targets_is_two_disks_and_a_port_has_a_session_with_each() {
    let served = served();
    let (mut first, mut second) = (served.login(&to(TARGET)), served.login(&to(SECOND)));
    for (initiator, byte) in [(&mut first, 0xaa), (&mut second, 0xbb)] {
        assert_eq!(
            initiator
                .write(0, &rw16(WRITE, 0, 1), &[byte; 512], 512, 0)
                .status,
            0
        );
    }
    for (initiator, byte) in [(&mut first, 0xaa), (&mut second, 0xbb)] {
        assert_eq!(initiator.read(0, &rw16(READ, 0, 1), 512).data, [byte; 512]);
    }
    // A connection cannot join a session with another target.
    let join = Login {
        tsih: first.tsih,
        cid: 1,
        ..to(SECOND)
    };
    assert_eq!(Initiator::connect(served.address()).log_in(&join), 0x020a);
    // A new login of the same port ends its session with that target only.
    let mut again = served.login(&to(TARGET));
    assert!(first.is_gone());
    assert_eq!(second.ping(b"x").data, b"x");
    // So does a cold reset of a target.
    assert_eq!(again.manage(7, 0, u32::MAX, 0), 0);
    assert!(again.is_gone());
    assert_eq!(second.read(0, &rw16(READ, 0, 1), 512).data, [0xbb; 512]);
}

#[test]
fn targets_that_cannot_be_told_apart_are_refused() {
    use block_io::{Worker, WorkerOptions};
    use storage_virtualizer::iscsi::{IscsiOptions, IscsiServer, IscsiServerError};
    let worker = Worker::start("iscsi", WorkerOptions::default()).unwrap();
    let start = |names: &[&str]| {
        let options = IscsiOptions {
            targets: names.iter().map(|name| IscsiTarget::open(name)).collect(),
            ..IscsiOptions::default()
        };
        IscsiServer::start::<crate::disk::Disk, _>(worker.handle(), options, Vec::new).map(drop)
    };
    assert!(matches!(start(&[]), Err(IscsiServerError::NoTarget)));
    assert!(matches!(
        start(&[TARGET, TARGET]),
        Err(IscsiServerError::Twice(_))
    ));
    start(&[TARGET, SECOND]).unwrap();
}
