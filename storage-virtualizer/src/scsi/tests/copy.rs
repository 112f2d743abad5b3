//! EXTENDED COPY and what became of it.

use super::*;

fn unit_descriptor(naa: &[u8; 8]) -> Vec<u8> {
    let mut descriptor = vec![0; 32];
    descriptor[..8].copy_from_slice(&[0xe4, 0, 0, 0, 1, 3, 0, 8]);
    descriptor[8..16].copy_from_slice(naa);
    descriptor[29..32].copy_from_slice(&[0, 2, 0]);
    descriptor
}

fn segment(from: u64, to: u64, count: u16) -> Vec<u8> {
    let mut descriptor = vec![2, 0, 0, 24, 0, 0, 0, 0, 0, 0];
    descriptor.extend(count.to_be_bytes());
    descriptor.extend(from.to_be_bytes());
    descriptor.extend(to.to_be_bytes());
    descriptor
}

fn list(id: u8, units: &[Vec<u8>], segments: &[Vec<u8>]) -> Vec<u8> {
    let (units, segments) = (units.concat(), segments.concat());
    let mut list = vec![id, 0];
    list.extend(u16::try_from(units.len()).unwrap().to_be_bytes());
    list.extend([0; 4]);
    list.extend(u32::try_from(segments.len()).unwrap().to_be_bytes());
    list.extend([0; 4]);
    list.extend(units);
    list.extend(segments);
    list
}

fn copy(bench: &Bench, list: &[u8]) -> Answer {
    let mut cdb = [0; 16];
    cdb[0] = 0x83;
    cdb[10..14].copy_from_slice(&u32::try_from(list.len()).unwrap().to_be_bytes());
    bench.tell(&cdb, list)
}

fn results(bench: &Bench, action: u8, id: u8) -> Answer {
    bench.ask(&[0x84, action, id, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0])
}

#[test]
fn blocks_are_copied_within_the_unit_even_onto_themselves() {
    let bench = Bench::new();
    let own = vec![unit_descriptor(&bench.unit.options().identity.naa())];
    let data = pattern(1, 16);
    bench.tell(&ten(0x2a, 0, 0, 16), &data).assert_good();
    copy(&bench, &list(7, &own, &[segment(0, 100, 16), segment(0, 200, 2)])).assert_good();
    assert_eq!(bench.content(100, 16), data);
    assert_eq!(bench.content(200, 2), data[..1024]);
    assert_eq!(
        results(&bench, 0, 7).assert_good().data,
        [0, 0, 0, 8, 1, 0, 2, 0, 0, 0, 0, 0]
    );
    results(&bench, 0, 8).assert_field(true, (2, None));
    // Overlapping, both ways.
    copy(&bench, &list(8, &own, &[segment(100, 104, 12)])).assert_good();
    assert_eq!(bench.content(104, 12), data[..12 * 512]);
    copy(&bench, &list(8, &own, &[segment(104, 102, 12)])).assert_good();
    assert_eq!(bench.content(102, 12), data[..12 * 512]);
    copy(&bench, &[]).assert_good();
    // A failure is remembered.
    bench.disk.fail(Some((block_io::Operation::Write, libc::EIO)));
    assert_eq!(
        copy(&bench, &list(9, &own, &[segment(0, 50, 1)])).sense().1,
        Code::WRITE_ERROR
    );
    assert_eq!(results(&bench, 0, 9).assert_good().data[4..7], [2, 0, 0]);
}

#[test]
fn lists_that_cannot_be_done_are_refused_before_anything_is_copied() {
    let bench = Bench::new();
    let own = vec![unit_descriptor(&bench.unit.options().identity.naa())];
    let good = segment(0, 8, 1);
    let code = |list: &[u8]| copy(&bench, list).sense().1;
    bench.tell(&ten(0x2a, 0, 0, 1), &[1; 512]).assert_good();
    let other = vec![unit_descriptor(&[0x3f; 8])];
    assert_eq!(
        code(&list(0, &other, std::slice::from_ref(&good))),
        Code::COPY_TARGET_NOT_REACHABLE
    );
    let mut kind = own.clone();
    kind[0][0] = 0xe0;
    assert_eq!(
        code(&list(0, &kind, std::slice::from_ref(&good))),
        Code::UNSUPPORTED_TARGET_DESCRIPTOR
    );
    assert_eq!(
        code(&list(0, &vec![own[0].clone(); 17], &[])),
        Code::TOO_MANY_TARGET_DESCRIPTORS
    );
    assert_eq!(
        code(&list(0, &own, &vec![good.clone(); 65])),
        Code::TOO_MANY_SEGMENT_DESCRIPTORS
    );
    let mut tape = good.clone();
    tape[0] = 3;
    assert_eq!(
        code(&list(0, &own, &[good.clone(), tape])),
        Code::UNSUPPORTED_SEGMENT_DESCRIPTOR
    );
    assert_eq!(
        code(&list(0, &own, &[good.clone(), segment(0, 255, 2)])),
        Code::LBA_OUT_OF_RANGE
    );
    assert_eq!(
        code(&list(0, &own, &[good[..27].to_vec()])),
        Code::PARAMETER_LIST_LENGTH_ERROR
    );
    assert_eq!(code(&[0; 15]), Code::PARAMETER_LIST_LENGTH_ERROR);
    let mut unknown = good.clone();
    unknown[5] = 1;
    copy(&bench, &list(0, &own, &[unknown])).assert_field(false, (16 + 32 + 4, None));
    let mut block = own.clone();
    block[0][30] = 16;
    copy(&bench, &list(0, &block, std::slice::from_ref(&good))).assert_field(false, (16 + 29, None));
    let mut inline = list(0, &own, std::slice::from_ref(&good));
    inline[15] = 1;
    copy(&bench, &inline).assert_field(false, (12, None));
    assert_eq!(bench.content(8, 1), [0; 512]);
}

#[test]
fn what_can_be_copied_is_told() {
    let bench = Bench::new();
    let data = results(&bench, 3, 0).assert_good().data.clone();
    assert_eq!(data.len(), 46);
    assert_eq!(data[..5], [0, 0, 0, 42, 1]);
    assert_eq!(data[8..12], [0, 16, 0, 64]);
    assert_eq!(data[37], 9);
    assert_eq!(data[43..], [2, 0x02, 0xe4]);
    bench.refuses(&[(&[0x84, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], (1, Some(4)))]);
}
