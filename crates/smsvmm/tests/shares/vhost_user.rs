//! Disks and LUNs over vhost-user.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use expanded_api::{Answer as Answered, Request};
use storage_virtualizer::vhost_user::front_end::{FrontEndKind, VhostUserDevice};
use virtio_core::VirtioDevice;

use super::driver::scsi::{
    Answer, BAD_TARGET, CHECK_CONDITION, DATA, Initiator, OK, PLACE, TEST_UNIT_READY, lun, read, told, write,
};
use super::driver::{readable, writable};
use super::scsi_machine::{front_end, machine};
use super::{Place, guest, until};

/// Writes a block of a LUN and reads it, if the LUN is there.
fn write_and_read(driver: &mut Initiator, number: u16, block: u32, byte: u8) -> Result<(), Answer> {
    driver.put(DATA, &[byte; 512]);
    let out = driver.command(lun(0, number), &write(block, 1), Some(readable(DATA, 512)));
    if out != Answer::good() {
        return Err(out);
    }
    driver.put(DATA + PLACE, &[0; 512]);
    let read = driver.command(lun(0, number), &read(block, 1), Some(writable(DATA + PLACE, 512)));
    if read != Answer::good() {
        return Err(read);
    }
    let mut found = [0; 512];
    driver.get(DATA + PLACE, &mut found);
    assert!(found == [byte; 512]);
    Ok(())
}

/// The disks of which the expanded API tells a machine.
fn looked_after(driver: &mut Initiator, tag: u32) -> Vec<String> {
    match guest::ask(driver, 0, tag, &Request::ListDisks {}).unwrap() {
        Answered::Disks(disks) => disks.into_iter().filter_map(|disk| disk.path).collect(),
        other => panic!("{other:?}"),
    }
}

fn code(answer: &Answer) -> Option<(u8, u8, u8)> {
    (answer.status == CHECK_CONDITION)
        .then_some(answer.sense)
        .flatten()
}

#[test]
fn luns_come_and_go_at_all_sockets_while_machines_go_on() {
    let place = Place::new();
    place.pool(&["/a.dsk", "/b.dsk"]);
    let line = "vhost-user-scsi --devices d0,d1 /a.dsk --socket one.sock --socket two.sock";
    let share = place.serve(line, "is served at two.sock");
    until("it can be managed", || place.path("m.sock").exists());
    let (mut one, _one) = machine(&place.path("one.sock"));
    let (mut two, _two) = machine(&place.path("two.sock"));
    for driver in [&mut one, &mut two] {
        driver.greet(lun(0, 0));
        (0..8).for_each(|buffer| driver.offer_event(buffer));
    }
    write_and_read(&mut one, 0, 7, 1).unwrap();

    assert_eq!(place.add("/b.dsk"), "/b.dsk is served as LUN 1\n");
    for driver in [&mut one, &mut two] {
        assert_eq!(driver.event(), (1, told(0, 1), 1));
        let answer = driver.command(lun(0, 0), &TEST_UNIT_READY, None);
        assert_eq!(code(&answer), Some((6, 0x3f, 0x0e)));
        driver.greet(lun(0, 1));
    }
    write_and_read(&mut one, 1, 3, 2).unwrap();
    assert_eq!(looked_after(&mut one, 1), ["/a.dsk", "/b.dsk"]);
    let status = place.status();
    assert_eq!(status["kind"], "vhost-user-scsi");
    assert_eq!(status["clients"].as_array().unwrap().len(), 2);
    assert!(status["clients"][0]["counts"]["writes"].as_u64().unwrap() >= 2);
    assert_eq!(status["clients"][1]["counts"]["writes"], 0);
    assert_eq!(place.disk("/b.dsk").unwrap()["size"], 16 << 20);

    // A new size is told.
    std::fs::write(place.path("share.toml"), "[management]\nsocket = \"m.sock\"\n").unwrap();
    place.run("disk --config share.toml resize /b.dsk 24M");
    for driver in [&mut one, &mut two] {
        assert_eq!(driver.event(), (3, told(0, 1), 0x092a));
        let answer = driver.command(lun(0, 1), &TEST_UNIT_READY, None);
        assert_eq!(code(&answer), Some((6, 0x2a, 0x09)));
        // Each adapter has told it of the unit, which both have.
        while driver.command(lun(0, 1), &TEST_UNIT_READY, None) != Answer::good() {}
    }

    // Removed under load: what was acknowledged is there.
    let ended = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let end = Instant::now() + Duration::from_secs(30);
            for round in 0_u32.. {
                assert!(Instant::now() < end, "it is not told");
                let byte = u8::try_from(round % 251).unwrap();
                if let Err(answer) = write_and_read(&mut two, 1, round % 64, byte) {
                    return (round, answer);
                }
            }
            unreachable!()
        });
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(place.remove("/b.dsk"), "/b.dsk is served no more\n");
        load.join().unwrap()
    });
    let (rounds, answer) = ended;
    assert!(rounds > 2);
    assert!(
        code(&answer) == Some((5, 0x25, 0)) || answer.response != OK || answer.response == BAD_TARGET,
        "{answer:?}"
    );
    assert_eq!(one.event(), (1, told(0, 1), 2));
    let answer = one.command(lun(0, 0), &TEST_UNIT_READY, None);
    assert_eq!(code(&answer), Some((6, 0x3f, 0x0e)));
    write_and_read(&mut one, 0, 8, 3).unwrap();
    assert_eq!(looked_after(&mut one, 2), ["/a.dsk"]);

    for (line, said) in [
        ("add /b.dsk --lun 0", "LUN 0 is taken by /a.dsk"),
        ("add /a.dsk", "/a.dsk is served already"),
        ("add /none.dsk", "/none.dsk"),
        ("add --image x", "serves disks of the pool tank"),
        ("remove /b.dsk", "no such disk is served"),
        ("disconnect 5-5", "no such client is connected"),
    ] {
        let (verb, rest) = line.split_once(' ').unwrap();
        let error = place.fails(&format!("share {verb} --management m.sock {rest}"));
        assert!(error.contains(said), "{line}: {error}");
    }
    // It is free, and comes again with what was written.
    place.run("disk --config share.toml snapshot --name later /b.dsk");
    place.add("/b.dsk --lun 5");
    one.greet(lun(0, 5));
    let last = rounds - 1;
    one.command(lun(0, 5), &read(last % 64, 1), Some(writable(DATA, 512)));
    let mut found = [0; 512];
    one.get(DATA, &mut found);
    assert_eq!(u32::from(found[0]), last % 251);

    place.run("share disconnect --management m.sock 1-0");
    write_and_read(&mut one, 5, 9, 4).unwrap();
    drop((one, two));
    place.run("share stop --management m.sock");
    share.ended();
}

#[test]
fn a_disk_comes_and_goes_with_its_socket() {
    let place = Place::new();
    place.pool(&["/a.dsk", "/b.dsk"]);
    let line = "vhost-user --devices d0,d1 /a.dsk --socket a.sock";
    let share = place.serve(line, "is served at a.sock");
    until("it can be managed", || place.path("m.sock").exists());
    let error = place.fails("share add --management m.sock /b.dsk");
    assert!(error.contains("each disk has a socket of its own"), "{error}");
    let said = place.add("/b.dsk --socket b.sock");
    assert_eq!(
        said,
        format!("/b.dsk is served at {}\n", place.path("b.sock").display())
    );
    let a = front_end(&place.path("a.sock"), FrontEndKind::Blk);
    let capacity = |device: &VhostUserDevice| {
        let mut capacity = [0; 8];
        device.read_config(0, &mut capacity);
        u64::from_le_bytes(capacity) * 512
    };
    assert_eq!(capacity(&a), 16 << 20);
    {
        let b = front_end(&place.path("b.sock"), FrontEndKind::Blk);
        assert_eq!(capacity(&b), 16 << 20);
        let status = place.status();
        assert_eq!(status["clients"].as_array().unwrap().len(), 2);
        assert_eq!(place.disk("/b.dsk").unwrap()["clients"], 1);
        place.remove("/b.dsk");
    }
    assert!(!place.path("b.sock").exists());
    // A new size is told, and the disk that went is free.
    std::fs::write(place.path("share.toml"), "[management]\nsocket = \"m.sock\"\n").unwrap();
    place.run("disk --config share.toml delete /b.dsk");
    place.run("disk --config share.toml resize /a.dsk 24M");
    until("it is told", || capacity(&a) == 24 << 20);
    for (line, said) in [
        ("add /a.dsk --socket c.sock", "/a.dsk is served already"),
        ("add /none.dsk --socket c.sock", "/none.dsk"),
        ("add /a.dsk@x --socket c.sock --lun 3", "have no `lun`"),
        ("remove /b.dsk", "no such disk is served"),
        ("disconnect 1", "no such client is connected"),
    ] {
        let (verb, rest) = line.split_once(' ').unwrap();
        let error = place.fails(&format!("share {verb} --management m.sock {rest}"));
        assert!(error.contains(said), "{line}: {error}");
    }
    drop(a);
    place.run("share stop --management m.sock");
    share.ended();
    assert!(!place.path("a.sock").exists());
}

#[test]
fn images_come_and_go_as_well() {
    let place = Place::new();
    place.image("a.img", 1 << 20);
    place.image("b.img", 2 << 20);
    let _share = place.serve("vhost-user --image a.img --socket a.sock", "is served at a.sock");
    until("it can be managed", || place.path("m.sock").exists());
    place.add("--image b.img --socket b.sock --read-only");
    let name = place.path("b.img").display().to_string();
    let b = place.disk(&name).unwrap();
    assert_eq!((&b["size"], &b["read-only"]), (&(2 << 20).into(), &true.into()));
    let error = place.fails("share add --management m.sock --image c=a.img --socket c.sock");
    assert!(error.contains("in use"), "{error}");
    place.remove(&name);
    assert!(place.is_free("b.img"));
}

#[test]
fn a_server_that_may_miss_what_another_has_answered_says_so() {
    const SAID: &str = "may lack some of it";
    let place = Place::new();
    place.pool(&["/a.dsk"]);
    let serve = || {
        place.serve(
            "vhost-user-scsi --devices d0,d1 --socket v /a.dsk",
            "is served at v",
        )
    };
    let mut share = serve();
    let (mut driver, _device) = machine(&place.path("v"));
    driver.greet(lun(0, 0));
    let tail = place.tail.get().unwrap();
    for block in [8, 16, 24] {
        write_and_read(&mut driver, 0, block, 7).unwrap();
        drop(share);
        if block == 24 {
            // As for another user, or in a container.
            std::fs::remove_file(tail).unwrap();
        }
        share = serve();
        driver.greet(lun(0, 0));
        write_and_read(&mut driver, 0, 32, 8).unwrap();
        let events = place.run("events --socket m.sock --json");
        assert_eq!(events.contains("unflushed-missing"), block == 24, "{events}");
        if block == 24 {
            until("it says so", || share.has_said(SAID));
        } else {
            assert!(!share.has_said(SAID));
        }
    }
    // It is said once. Whoever ends in order leaves nothing to be found.
    let stop = "share stop --management m.sock";
    until("it is managed", || place.output(stop).status.success());
    share.ended();
    assert_eq!(std::fs::metadata(tail).unwrap().blocks(), 0);
    share = serve();
    driver.greet(lun(0, 0));
    write_and_read(&mut driver, 0, 40, 9).unwrap();
    assert!(!share.has_said(SAID));
}
