//! Mode pages and logs.

use super::*;

fn page(bench: &Bench, control: u8, code: u8) -> Vec<u8> {
    let answer = bench.ask(&[0x1a, 0x08, control << 6 | code, 0, 255, 0]);
    let data = answer.assert_good().data.clone();
    assert_eq!(usize::from(data[0]) + 1, data.len());
    data[4..].to_vec()
}

/// MODE SELECT(6) of these pages.
fn select(bench: &Bench, pages: &[u8]) -> Answer {
    let list = [&[0; 4][..], pages].concat();
    bench.tell(&[0x15, 0x10, 0, 0, u8::try_from(list.len()).unwrap(), 0], &list)
}

/// The page with some bits flipped.
fn flipped(bench: &Bench, code: u8, byte: usize, bits: u8) -> Vec<u8> {
    let mut page = page(bench, 0, code);
    page[byte] ^= bits;
    page
}

#[test]
fn pages_have_current_changeable_and_default_values() {
    let bench = Bench::new();
    for (code, length) in [(0x01, 10), (0x08, 18), (0x0a, 10), (0x1c, 10)] {
        for control in 0..3 {
            assert_eq!(page(&bench, control, code)[..2], [code, length]);
            assert_eq!(page(&bench, control, code).len(), usize::from(length) + 2);
        }
        let answer = bench.ask(&[0x1a, 0, 3 << 6 | code, 0, 255, 0]);
        answer.assert_sense(Key::IllegalRequest, Code::SAVING_NOT_SUPPORTED);
    }
    assert_eq!(page(&bench, 0, 0x08)[2], 4);
    assert_eq!(
        page(&bench, 1, 0x08)[2..],
        [4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    assert_eq!(page(&bench, 1, 0x0a)[2..], [4, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(page(&bench, 0, 0x3f).len(), 12 + 20 + 12 + 12);
    bench.refuses(&[
        (&[0x1a, 0, 0x02, 0, 255, 0], (2, Some(5))),
        (&[0x1a, 0, 0x08, 1, 255, 0], (3, None)),
        (&[0x1a, 0x10, 0x08, 0, 255, 0], (1, Some(4))),
        (&[0x5a, 0, 0x02, 0, 0, 0, 0, 0, 255, 0], (2, Some(5))),
    ]);
}

#[test]
fn headers_and_descriptors_of_blocks_are_of_both_forms() {
    let bench = Bench::new();
    let six = bench.ask(&[0x1a, 0, 8, 0, 255, 0]).assert_good().data.clone();
    assert_eq!(six[..12], [31, 0, 0x10, 8, 0, 0, 1, 0, 0, 0, 2, 0]);
    let ten = bench
        .ask(&[0x5a, 0, 8, 0, 0, 0, 0, 0, 255, 0])
        .assert_good()
        .data
        .clone();
    assert_eq!(ten[..16], [0, 34, 0, 0x10, 0, 0, 0, 8, 0, 0, 1, 0, 0, 0, 2, 0]);
    let long = bench
        .ask(&[0x5a, 0x10, 8, 0, 0, 0, 0, 0, 255, 0])
        .assert_good()
        .data
        .clone();
    assert_eq!(long[..8], [0, 42, 0, 0x10, 1, 0, 0, 16]);
    assert_eq!(long[8..24], [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    let without = bench.ask(&[0x5a, 0x18, 8, 0, 0, 0, 0, 0, 255, 0]).data;
    assert_eq!(without[..8], [0, 26, 0, 0x10, 0, 0, 0, 0]);
    let read_only = Bench::read_only();
    assert_eq!(read_only.ask(&[0x1a, 8, 8, 0, 255, 0]).data[2], 0x90);
    // What was sensed can be selected as it is, in all forms.
    for (cdb, mut list) in [
        (vec![0x15, 0x10, 0, 0, 32, 0], six),
        (vec![0x55, 0x10, 0, 0, 0, 0, 0, 0, 36, 0], ten),
        (vec![0x55, 0x10, 0, 0, 0, 0, 0, 0, 44, 0], long),
    ] {
        list[0] = 0;
        if cdb[0] == 0x55 {
            list[1] = 0;
        }
        bench.tell(&cdb, &list).assert_good();
    }
}

#[test]
fn without_the_write_cache_each_write_is_durable() {
    let bench = Bench::new();
    let other = nexus(2);
    bench.by(&other, &[0; 6], &[], 0);
    select(&bench, &flipped(&bench, 8, 2, 4)).assert_good();
    assert_eq!(bench.disk.flushes(), 1, "what was cached is durable");
    assert_eq!(page(&bench, 0, 8)[2], 0);
    assert_eq!(page(&bench, 2, 8)[2], 4);
    bench.tell(&ten(0x2a, 0, 0, 1), &[1; 512]).assert_good();
    assert_eq!(bench.disk.durable_writes(), 1);
    bench.tell(&ten(0x41, 0, 0, 1), &[0; 512]).assert_good();
    assert_eq!(bench.disk.flushes(), 2);
    // The others are told.
    let answer = bench.by(&other, &[0; 6], &[], 0);
    answer.assert_sense(Key::UnitAttention, Code::MODE_PARAMETERS_CHANGED);
    bench.command(&[0; 6]).assert_good();
    // Nothing new is nothing to tell.
    select(&bench, &page(&bench, 0, 8)).assert_good();
    bench.by(&other, &[0; 6], &[], 0).assert_good();
    select(&bench, &flipped(&bench, 8, 2, 4)).assert_good();
    bench.tell(&ten(0x2a, 0, 0, 1), &[1; 512]).assert_good();
    assert_eq!(bench.disk.durable_writes(), 1);
}

#[test]
fn software_write_protection_and_the_format_of_sense_data_act() {
    let bench = Bench::new();
    select(&bench, &flipped(&bench, 0x0a, 4, 8)).assert_good();
    let answer = bench.tell(&ten(0x2a, 0, 0, 1), &[1; 512]);
    answer.assert_sense(Key::DataProtect, Code::SOFTWARE_WRITE_PROTECTED);
    assert_eq!(bench.ask(&[0x1a, 8, 8, 0, 255, 0]).data[2], 0x90);
    bench.ask(&ten(0x28, 0, 0, 1)).assert_good();
    select(&bench, &flipped(&bench, 0x0a, 2, 4)).assert_good();
    let answer = bench.tell(&ten(0x2a, 0, 0, 1), &[1; 512]);
    assert_eq!(answer.outcome.sense.as_slice(), [0x72, 7, 0x27, 2, 0, 0, 0, 0]);
    // A reset makes all as it was.
    bench.unit.reset(Reset::LogicalUnit);
    assert_eq!(bench.command(&[0; 6]).sense().1, Code::LOGICAL_UNIT_RESET);
    bench.tell(&ten(0x2a, 0, 0, 1), &[1; 512]).assert_good();
}

#[test]
fn wrong_parameters_are_named_and_change_nothing() {
    let bench = Bench::new();
    let before = page(&bench, 0, 0x3f);
    bench.refuses(&[
        (&[0x15, 0x00, 0, 0, 24, 0], (1, Some(4))),
        (&[0x15, 0x11, 0, 0, 24, 0], (1, Some(0))),
        (&[0x55, 0x11, 0, 0, 0, 0, 0, 0, 24, 0], (1, Some(0))),
    ]);
    let good = flipped(&bench, 8, 2, 4);
    let wrong = |pages: &[&[u8]]| select(&bench, &pages.concat());
    // A page that is right does nothing if the next one is wrong; a page that does not exist; a bit that cannot change.
    wrong(&[&good, &[0x02, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]]).assert_field(false, (24, Some(5)));
    wrong(&[&flipped(&bench, 8, 2, 1)]).assert_field(false, (6, Some(0)));
    wrong(&[&flipped(&bench, 0x0a, 3, 0x40)]).assert_field(false, (7, Some(6)));
    wrong(&[&flipped(&bench, 8, 0, 0x80)]).assert_field(false, (4, Some(7)));
    wrong(&[&flipped(&bench, 8, 0, 0x40)]).assert_field(false, (4, Some(6)));
    wrong(&[&flipped(&bench, 8, 1, 1)]).assert_field(false, (5, None));
    wrong(&[&good[..10]]).assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    wrong(&[&good[..1]]).assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    // Headers and descriptors of blocks.
    let list = |bytes: &[u8]| bench.tell(&[0x15, 0x10, 0, 0, u8::try_from(bytes.len()).unwrap(), 0], bytes);
    list(&[0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0]).assert_field(false, (3, None));
    list(&[0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 2, 0]).assert_field(false, (4, None));
    list(&[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 16, 0]).assert_field(false, (9, None));
    list(&[0, 0, 0, 8, 0]).assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    list(&[0, 0, 0]).assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    list(&[0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 2, 0]).assert_good();
    bench
        .tell(&[0x15, 0x10, 0, 0, 24, 0], &[0; 20])
        .assert_sense(Key::IllegalRequest, Code::PARAMETER_LIST_LENGTH_ERROR);
    assert_eq!(page(&bench, 0, 0x3f), before);
}

fn log(bench: &Bench, page: u8, first: u8) -> Answer {
    bench.ask(&[0x4d, 0, 0x40 | page, 0, 0, 0, first, 16, 0, 0])
}

#[test]
fn logs_that_are_listed_exist_and_their_parameters_are_whole() {
    let bench = Bench::new();
    let listed = log(&bench, 0, 0).assert_good().data.clone();
    assert_eq!(
        listed,
        [0, 0, 0, 8, 0x00, 0x02, 0x03, 0x05, 0x0d, 0x0e, 0x10, 0x2f]
    );
    let with_subpages = bench.ask(&[0x4d, 0, 0x40, 0xff, 0, 0, 0, 16, 0, 0]);
    assert_eq!(with_subpages.assert_good().data[..6], [0x40, 0xff, 0, 18, 0, 0]);
    for page in &listed[5..] {
        let data = log(&bench, *page, 0).assert_good().data.clone();
        assert_eq!(data[0], *page);
        let mut rest = &data[4..];
        assert_eq!(usize::from(u16::from_be_bytes([data[2], data[3]])), rest.len());
        let mut last = None;
        while !rest.is_empty() {
            let code = u16::from_be_bytes([rest[0], rest[1]]);
            assert!(last < Some(code));
            last = Some(code);
            rest = &rest[4 + usize::from(rest[3])..];
        }
        // Parameters from a number on; beyond the last there are none.
        let last = u8::try_from(last.unwrap()).unwrap();
        assert_eq!(log(&bench, *page, last).assert_good().data[5], last);
        log(&bench, *page, last + 1).assert_field(true, (5, None));
    }
    bench.refuses(&[
        (&[0x4d, 0, 0x41, 0, 0, 0, 0, 0, 64, 0], (2, Some(5))),
        (&[0x4d, 0, 0x02, 0, 0, 0, 0, 0, 64, 0], (2, Some(7))),
        (&[0x4d, 1, 0x42, 0, 0, 0, 0, 0, 64, 0], (1, Some(0))),
        (&[0x4d, 0, 0x42, 1, 0, 0, 0, 0, 64, 0], (3, None)),
    ]);
}

#[test]
fn bytes_that_are_read_written_and_verified_are_counted() {
    let bench = Bench::new();
    let total = |page| {
        let data = log(&bench, page, 5).assert_good().data.clone();
        u64::from_be_bytes(data[8..16].try_into().unwrap())
    };
    bench.tell(&ten(0x2a, 0, 0, 4), &[1; 2048]).assert_good();
    bench.ask(&ten(0x28, 0, 0, 3)).assert_good();
    bench.ask(&[0x08, 0, 0, 0, 1, 0]).assert_good();
    bench.command(&ten(0x2f, 0, 0, 2)).assert_good();
    assert_eq!((total(2), total(3), total(5)), (2048, 2048, 1024));
}
