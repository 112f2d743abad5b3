//! Data in both directions, in all the ways in which they may come, and in some in which they may not.

use crate::initiator::{Initiator, Login, NO_TAG, READ, WRITE, put, rw16, tag_of};
use crate::{Served, pattern};

/// Logins with all kinds of digests and limits.
fn logins() -> Vec<Login> {
    let base = Login::default;
    vec![
        base(),
        base().key("HeaderDigest", "CRC32C").key("DataDigest", "CRC32C"),
        base()
            .key("InitialR2T", "No")
            .key("FirstBurstLength", "8192")
            .key("MaxBurstLength", "16384")
            .key("MaxOutstandingR2T", "4")
            .key("MaxRecvDataSegmentLength", "1024"),
        base()
            .key("InitialR2T", "No")
            .key("ImmediateData", "Yes")
            .key("DataDigest", "CRC32C")
            .key("MaxBurstLength", "65536"),
    ]
}

#[test]
fn what_was_written_is_read_whatever_was_agreed_on() {
    let served = Served::start();
    for (number, login) in logins().iter().enumerate() {
        let mut initiator = served.login(login);
        let unasked = login.keys.contains(&("InitialR2T", "No".to_owned()));
        for (turn, (bytes, immediate, unsolicited)) in [
            (512, 0, 0),
            (512, 512, 0),
            (8192, 4096, 4096),
            (40_960, 512, 1024),
            (262_144, 8192, 0),
            (1 << 20, 0, 0),
        ]
        .into_iter()
        .enumerate()
        {
            let unsolicited = if unasked { unsolicited } else { 0 };
            let data = pattern(bytes, (number * 10 + turn) as u64);
            let blocks = u32::try_from(bytes / 512).unwrap();
            let block = (turn * 7) as u64;
            let written = initiator.write(0, &rw16(WRITE, block, blocks), &data, immediate, unsolicited);
            assert_eq!((written.status, written.residual), (0, 0), "{login:?} {bytes}");
            let read = initiator.read(0, &rw16(READ, block, blocks), u32::try_from(bytes).unwrap());
            assert_eq!((read.status, read.residual), (0, 0));
            assert!(read.data == data, "{login:?} {bytes}");
        }
        assert_eq!(initiator.log_out(0, 0), 0);
    }
}

#[test]
fn residuals_tell_what_was_not_moved() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default());
    let data = pattern(2048, 1);
    // Less than the command wants, and more.
    let read = initiator.read(0, &rw16(READ, 0, 4), 1024);
    assert_eq!((read.status, read.data.len(), read.residual), (0, 1024, 1024));
    let read = initiator.read(0, &rw16(READ, 0, 2), 2048);
    assert_eq!((read.status, read.data.len(), read.residual), (0, 1024, -1024));
    let read = initiator.read(0, &rw16(READ, 0, 2), 0);
    assert_eq!((read.data.len(), read.residual), (0, 1024));
    let written = initiator.write(0, &rw16(WRITE, 0, 2), &data, 0, 0);
    assert_eq!((written.status, written.residual), (0, -1024));
    let written = initiator.write(0, &rw16(WRITE, 0, 8), &data, 2048, 0);
    assert_eq!((written.status, written.residual), (0, 2048));
    let failed = initiator.read(0, &rw16(READ, crate::BLOCKS, 1), 512);
    assert_eq!(
        (failed.status, failed.sense, failed.residual),
        (2, Some((5, 0x21, 0)), -512)
    );
    // More than any command may move.
    let huge = initiator.read(0, &rw16(READ, 0, 1), 64 << 20);
    assert_eq!((huge.status, huge.data.len()), (0, 512));
    let request = initiator.command(0, &rw16(WRITE, 0, 1 << 17), 0xa1, 64 << 20);
    initiator.send(request, &[]);
    assert_eq!(initiator.end(tag_of(&request)).sense, Some((5, 0x24, 0)));
}

#[test]
fn data_that_break_the_rules_fail_their_command_and_nothing_is_written() {
    let served = Served::start();
    let rules = Login::default()
        .key("FirstBurstLength", "1024")
        .key("InitialR2T", "No");
    let mut initiator = served.login(&rules);
    let zeroes = initiator.read(0, &rw16(READ, 0, 8), 4096).data;
    // Immediate data beyond the first burst.
    let request = initiator.command(0, &rw16(WRITE, 0, 8), 0xa1, 4096);
    initiator.send(request, &[1; 2048]);
    assert_eq!(initiator.end(tag_of(&request)).sense, Some((0xb, 0x0c, 0x0c)));
    // Unsolicited data: a wrong number, a wrong place, too many.
    for (number, at, length) in [(1, 0, 512), (0, 512, 512), (0, 0, 1536)] {
        let request = initiator.command(0, &rw16(WRITE, 0, 8), 0x21, 4096);
        initiator.send(request, &[]);
        initiator.data_out(tag_of(&request), NO_TAG, number, at, &vec![1; length], true);
        let (key, ..) = initiator.end(tag_of(&request)).sense.unwrap();
        assert_eq!(key, 0xb, "{number} {at} {length}");
    }
    // Data that were asked for: too few, out of order, beyond.
    for steps in [
        &[(0, 0, 512)][..],
        &[(0, 512, 512), (1, 0, 512)],
        &[(1, 0, 4096)],
        &[(0, 0, 8192)],
    ] {
        let request = initiator.command(0, &rw16(WRITE, 0, 8), 0xa1, 4096);
        initiator.send(request, &[]);
        let asked = initiator.receive().unwrap();
        assert_eq!(asked.opcode(), 0x31);
        for (index, (number, at, length)) in steps.iter().enumerate() {
            let last = index + 1 == steps.len();
            initiator.data_out(
                tag_of(&request),
                asked.u32(20),
                *number,
                *at,
                &vec![1; *length],
                last,
            );
        }
        let (key, ..) = initiator.end(tag_of(&request)).sense.unwrap();
        assert_eq!(key, 0xb, "{steps:?}");
    }
    // Data for nobody are not looked at.
    initiator.data_out(999, NO_TAG, 0, 0, &[1; 512], true);
    initiator.data_out(999, 5, 0, 0, &[1; 512], true);
    let read = initiator.read(0, &rw16(READ, 0, 8), 4096);
    assert!(read.data == zeroes, "something was written");
}

#[test]
fn without_immediate_or_unsolicited_data_they_are_refused() {
    let served = Served::start();
    let mut initiator = served.login(&Login::default().key("ImmediateData", "No"));
    let request = initiator.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    initiator.send(request, &[1; 512]);
    assert_eq!(initiator.end(tag_of(&request)).sense, Some((0xb, 0x0c, 0x0c)));
    let request = initiator.command(0, &rw16(WRITE, 0, 1), 0x21, 512);
    initiator.send(request, &[]);
    initiator.data_out(tag_of(&request), NO_TAG, 0, 0, &[1; 512], true);
    assert_eq!(initiator.end(tag_of(&request)).sense, Some((0xb, 0x0c, 0x0c)));
}

#[test]
fn wrong_digests_end_the_command_or_the_connection() {
    let served = Served::start();
    let both = Login::default()
        .key("HeaderDigest", "CRC32C")
        .key("DataDigest", "CRC32C");
    let mut initiator = served.login(&both);
    // Of data that were asked for: a reject, and the command fails.
    let request = initiator.command(0, &rw16(WRITE, 0, 1), 0xa1, 512);
    initiator.send(request, &[]);
    let asked = initiator.receive().unwrap();
    let mut out = crate::initiator::head(0x05, 0x80, tag_of(&request));
    put(&mut out, 20, asked.u32(20));
    let mut bytes = initiator.encode(out, &[7; 512]);
    *bytes.last_mut().unwrap() ^= 1;
    std::io::Write::write_all(&mut initiator.stream, &bytes).unwrap();
    let reject = initiator.receive().unwrap();
    assert_eq!((reject.opcode(), reject.head[2]), (0x3f, 2));
    assert_eq!(reject.data, &bytes[..48]);
    assert_eq!(initiator.end(tag_of(&request)).sense, Some((0xb, 0x47, 0x05)));
    // Of a header: nobody knows where the next one begins.
    let request = initiator.command(0, &[0; 6], 0x81, 0);
    let mut bytes = initiator.encode(request, &[]);
    bytes[50] ^= 1;
    std::io::Write::write_all(&mut initiator.stream, &bytes).unwrap();
    assert!(initiator.is_gone());
    // The server is there for the next one.
    served.login(&both);
}

#[test]
fn many_commands_that_wait_for_data_do_not_wait_for_each_other() {
    // Memory for two of them; the data of the first come last.
    let served = Served::with(|options| options.memory = 256 << 10);
    let mut initiator = served.login(&Login::default());
    let mut commands: Vec<[u8; 48]> = Vec::new();
    for number in 0..8 {
        let request = initiator.command(0, &rw16(WRITE, number * 256, 256), 0xa1, 128 << 10);
        initiator.send(request, &pattern(8192, number));
        commands.push(request);
    }
    let mut ended = 0;
    while ended < commands.len() {
        let pdu = initiator.receive().unwrap();
        if pdu.opcode() == 0x21 {
            assert_eq!(pdu.head[3], 0);
            ended += 1;
            continue;
        }
        let place = commands
            .iter()
            .position(|request| tag_of(request) == pdu.tag())
            .unwrap();
        let data = pattern(128 << 10, place as u64);
        let (at, length) = (pdu.u32(40) as usize, pdu.u32(44) as usize);
        initiator.data_out(pdu.tag(), pdu.u32(20), 0, at, &data[at..at + length], true);
    }
    for number in 0..8 {
        let read = initiator.read(0, &rw16(READ, number * 256, 256), 128 << 10);
        assert!(read.data == pattern(128 << 10, number), "{number}");
    }
}

#[test]
fn a_ping_comes_back_and_a_long_one_is_cut() {
    let served = Served::start();
    let mut initiator: Initiator = served.login(&Login::default().key("MaxRecvDataSegmentLength", "512"));
    let answer = initiator.ping(b"are you there");
    assert_eq!(
        (answer.opcode(), answer.data.as_slice()),
        (0x20, &b"are you there"[..])
    );
    assert_eq!(initiator.ping(&[1; 2000]).data, [1; 512]);
}
