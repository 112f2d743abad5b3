//! What the unit says that it is.

use super::*;

fn vital(bench: &Bench, page: u8) -> Vec<u8> {
    let answer = bench.ask(&[0x12, 1, page, 0x10, 0, 0]);
    let data = answer.assert_good().data.clone();
    assert_eq!(data[..2], [0, page]);
    assert_eq!(
        usize::from(u16::from_be_bytes([data[2], data[3]])) + 4,
        data.len()
    );
    data[4..].to_vec()
}

#[test]
fn inquiry_says_vendor_product_and_standards() {
    let bench = Bench::new();
    let data = bench.ask(&[0x12, 0, 0, 0, 255, 0]).assert_good().data.clone();
    assert_eq!(data[..5], [0, 0, 6, 0x12, 59]);
    assert_eq!(data.len(), 64);
    assert_eq!(data[8..32], *b"SMSVMM  DISK            ");
    assert_eq!(data[58..64], [0x00, 0xa0, 0x04, 0x60, 0x04, 0xc0]);
    // Cut to the allocation length.
    let short = bench.ask(&[0x12, 0, 0, 0, 5, 0]);
    assert_eq!(short.assert_good().data, data[..5]);
    assert_eq!(short.outcome.residual(36), Residual::Underflow(31));
    bench.refuses(&[
        (&[0x12, 0, 1, 0, 255, 0], (2, None)),
        (&[0x12, 1, 0x77, 0, 255, 0], (2, None)),
        (&[0x12, 1, 0xe5, 0, 255, 0], (2, None)),
        (&[0x12, 2, 0, 0, 255, 0], (1, Some(1))),
    ]);
    let removable = Bench::with(UnitOptions {
        removable: true,
        ..options()
    });
    assert_eq!(removable.ask(&[0x12, 0, 0, 0, 255, 0]).data[1], 0x80);
}

#[test]
fn all_pages_that_are_listed_exist_and_no_others() {
    let bench = Bench::new();
    let listed = vital(&bench, 0);
    assert_eq!(listed, [0x00, 0x80, 0x83, 0x86, 0xb0, 0xb1, 0xb2]);
    for page in 0..=255 {
        let answer = bench.ask(&[0x12, 1, page, 0x10, 0, 0]);
        assert_eq!(
            answer.outcome.status == Status::Good,
            listed.contains(&page),
            "{page:#x}"
        );
    }
}

#[test]
fn a_unit_is_known_by_designators_that_never_change() {
    let bench = Bench::new();
    assert_eq!(vital(&bench, 0x80), b"serial-1");
    let data = vital(&bench, 0x83);
    let mut rest = &data[..];
    let mut kinds = Vec::new();
    while !rest.is_empty() {
        let length = usize::from(rest[3]);
        kinds.push((rest[1], rest[4..4 + length].to_vec()));
        rest = &rest[4 + length..];
    }
    let identity = Identity::from_name("pool/disk", "serial-1");
    assert_eq!(kinds[0], (3, identity.naa().to_vec()));
    assert_eq!(identity.naa()[0] >> 4, 3);
    assert_eq!(kinds[1], (0x0a, [&[0x10, 0][..], &identity.uuid].concat()));
    assert_eq!(kinds[2], (1, b"SMSVMM  serial-1".to_vec()));
    assert_eq!(kinds[3], (0x14, vec![0, 0, 0, 1]));
    assert_eq!(kinds.len(), 4);
    // Units that were shown to guests keep what they are known by: this must not change.
    assert_eq!(identity.naa(), [0x3b, 0x8b, 0x9d, 0x91, 0x41, 0x5b, 0x9a, 0x8b]);
    let other = Identity::from_name("pool/disk2", "serial-1");
    assert_ne!(other.naa(), identity.naa());
}

#[test]
fn limits_of_requests_are_those_of_the_disk() {
    let bench = Bench::new();
    let limits = vital(&bench, 0xb0);
    assert_eq!(limits.len(), 60);
    assert_eq!(limits[..2], [1, 255]);
    let word = |at: usize| u32::from_be_bytes(limits[at - 4..at].try_into().unwrap());
    // As the standard numbers the bytes: granularity (6), optimum (12), UNMAP (20, 24, 28, 32), WRITE SAME (36).
    assert_eq!(limits[2..4], [0, 8]);
    assert_eq!(
        [word(8), word(12), word(20), word(24), word(28), word(32)],
        [0, 2048, 1 << 22, 256, 8, 1 << 31]
    );
    assert_eq!(limits[32..40], (1_u64 << 22).to_be_bytes());
    assert_eq!(vital(&bench, 0xb1)[..2], [0, 1]);
    assert_eq!(vital(&bench, 0xb2), [0, 0xe4, 2, 0]);
    assert_eq!(vital(&bench, 0x86)[..3], [0, 5, 1]);
    let thin = Bench::with(UnitOptions {
        provisioning: Provisioning::Thin,
        ..options()
    });
    assert_eq!(vital(&thin, 0xb2), [0, 0xe0, 2, 0]);
    let full = Bench::with(UnitOptions {
        provisioning: Provisioning::Full,
        ..options()
    });
    assert_eq!(vital(&full, 0xb2), [0, 0, 0, 0]);
    assert_eq!(vital(&full, 0xb0)[16..32], [0; 16]);
}

#[test]
fn capacities_are_told_in_blocks_of_the_disk() {
    let bench = Bench::new();
    let short = bench.ask(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(short.assert_good().data, [0, 0, 0, 255, 0, 0, 2, 0]);
    let long = bench.ask(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0]);
    let data = &long.assert_good().data;
    assert_eq!(data.len(), 32);
    assert_eq!(data[..16], [0, 0, 0, 0, 0, 0, 0, 255, 0, 0, 2, 0, 0, 3, 0xc0, 0]);
    let large = Bench::on(MemoryDisk::new(64 << 12, 4096), options());
    let data = large
        .ask(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0])
        .data;
    assert_eq!(data[..16], [0, 0, 0, 0, 0, 0, 0, 63, 0, 0, 16, 0, 0, 0, 0xc0, 0]);
    let data = [5; 4096];
    large.tell(&ten(0x2a, 0, 63, 1), &data).assert_good();
    assert_eq!(large.ask(&ten(0x28, 0, 63, 1)).assert_good().data, data);
    bench.refuses(&[
        (&[0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0], (5, Some(0))),
        (
            &[0x9e, 0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0],
            (1, Some(4)),
        ),
    ]);
}

#[test]
fn a_new_size_is_told_once_to_each() {
    let bench = Bench::new();
    let other = nexus(2);
    bench.by(&other, &[0; 6], &[], 0);
    bench.unit.capacity_changed();
    bench.unit.capacity_changed();
    for nexus in [&bench.nexus, &other] {
        // INQUIRY does not take it.
        bench.by(nexus, &[0x12, 0, 0, 0, 36, 0], &[], 36).assert_good();
        let answer = bench.by(nexus, &ten(0x28, 0, 0, 1), &[], 512);
        answer.assert_sense(Key::UnitAttention, Code::CAPACITY_CHANGED);
        bench.by(nexus, &ten(0x28, 0, 0, 1), &[], 512).assert_good();
    }
}

#[test]
fn request_sense_reports_and_takes_what_is_to_be_told() {
    let bench = Bench::new();
    let nothing = bench.ask(&[3, 0, 0, 0, 252, 0]);
    assert_eq!(nothing.assert_good().data[..3], [0x70, 0, 0]);
    bench.unit.capacity_changed();
    let fixed = bench.ask(&[3, 0, 0, 0, 252, 0]);
    let data = &fixed.assert_good().data;
    assert_eq!((data[2], data[12], data[13]), (6, 0x2a, 9));
    bench.unit.capacity_changed();
    let descriptors = bench.ask(&[3, 1, 0, 0, 252, 0]);
    assert_eq!(descriptors.assert_good().data[..4], [0x72, 6, 0x2a, 9]);
    bench.command(&[0; 6]).assert_good();
}

#[test]
fn luns_are_reported_as_the_initiator_sees_them() {
    let bench = Bench::new();
    bench.nexus.show([0, 3, 300].as_slice().into());
    let report = |select: u8| {
        bench
            .ask(&[0xa0, 0, select, 0, 0, 0, 0, 0, 1, 0, 0, 0])
            .assert_good()
            .data
            .clone()
    };
    let normal = [
        [0, 0, 0, 24, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 3, 0, 0, 0, 0, 0, 0],
        [0x41, 0x2c, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!(report(0), normal.as_flattened());
    assert_eq!(report(1)[..10], [0, 0, 0, 8, 0, 0, 0, 0, 0xc1, 1]);
    assert_eq!(report(2).len(), 8 + 4 * 8);
    bench.refuses(&[
        (&[0xa0, 0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0], (2, None)),
        (&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 15, 0, 0], (6, None)),
    ]);
}

#[test]
fn where_there_is_no_unit_only_a_few_commands_are_answered() {
    let initiator = nexus(1);
    initiator.show([5].as_slice().into());
    let ask = |cdb: &[u8], well_known| {
        let into = Data::of(&[0; 256]);
        let command = Command {
            cdb,
            data_out: &[],
            data_in: &into.pieces(),
        };
        let outcome = execute_without_unit(&initiator, &command, well_known);
        (outcome, into.0.as_slice().to_vec())
    };
    let (outcome, data) = ask(&[0x12, 0, 0, 0, 255, 0], false);
    assert_eq!((outcome.status, outcome.moved, data[0]), (Status::Good, 36, 0x7f));
    assert_eq!(ask(&[0x12, 0, 0, 0, 255, 0], true).1[0], 0x1e);
    assert_eq!(ask(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], false).1[9], 5);
    let (outcome, data) = ask(&[3, 0, 0, 0, 18, 0], false);
    assert_eq!((outcome.status, data[2], data[12]), (Status::Good, 5, 0x25));
    for (well_known, code) in [(false, 0x25), (true, 0x20)] {
        let (outcome, _) = ask(&ten(0x28, 0, 0, 1), well_known);
        assert_eq!(outcome.sense.as_slice()[12], code);
    }
    assert_eq!(ask(&[0; 6], true).0.status, Status::Good);
    assert_eq!(ask(&[0; 6], false).0.sense.as_slice()[2], 5);
}

#[test]
fn an_inquiry_with_a_lun_of_scsi_2_is_answered() {
    let bench = Bench::new();
    for lun in 0..8 {
        bench.ask(&[0x12, lun << 5, 0, 0, 36, 0]).assert_good();
    }
    bench
        .ask(&[0x12, 0x10, 0, 0, 36, 0])
        .assert_field(true, (1, Some(4)));
}

#[test]
fn the_table_of_commands_is_what_initiators_are_told() {
    let bench = Bench::with(UnitOptions {
        removable: true,
        ..options()
    });
    let all = bench
        .ask(&[0xa3, 0x0c, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0])
        .assert_good()
        .data
        .clone();
    let entries: Vec<_> = all[4..].chunks_exact(8).collect();
    assert_eq!(
        u32::from_be_bytes(*all.first_chunk().unwrap()) as usize,
        all.len() - 4
    );
    let known = super::super::table::supported(bench.unit.options());
    assert_eq!(entries.len(), known.count());
    let mut last = (0, 0);
    for (index, entry) in entries.iter().enumerate() {
        let (opcode, action) = (entry[0], u16::from_be_bytes([entry[2], entry[3]]));
        assert!(index == 0 || (opcode, action) > last, "ascending, and each once");
        last = (opcode, action);
        let has_action = entry[5] & 1 != 0;
        let one = |option: u8| {
            let [high, low] = action.to_be_bytes();
            bench.ask(&[0xa3, 0x0c, option, opcode, high, low, 0, 0, 1, 0, 0, 0])
        };
        let option = if has_action { 2 } else { 1 };
        for option in [option, 3] {
            let data = one(option).assert_good().data.clone();
            assert_eq!(data[1], 3, "supported");
            assert_eq!(data[2..4], entry[6..8], "length");
            assert_eq!(data[4], opcode);
            assert_eq!(data.len(), 4 + usize::from(data[3]));
        }
        // With timeouts.
        assert_eq!(one(option | 0x80).assert_good().data[1], 0x83);
        one(3 - option).assert_field(true, (2, Some(2)));
    }
    let timed = bench.ask(&[0xa3, 0x0c, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 0]).data;
    assert_eq!(timed.len(), 4 + entries.len() * 20);
    // What is not there.
    let one = |option, opcode, action| bench.ask(&[0xa3, 0x0c, option, opcode, 0, action, 0, 0, 1, 0, 0, 0]);
    assert_eq!(one(1, 0x04, 0).assert_good().data, [0, 1, 0, 0]);
    assert_eq!(one(2, 0x9e, 0x1f).assert_good().data, [0, 1, 0, 0]);
    one(4, 0, 0).assert_field(true, (2, Some(2)));
    // Writes: DPO and FUA, which tools look for.
    assert_eq!(one(1, 0x2a, 0).data[5] & 0x18, 0x18);
    // Every command that is not there is refused, and every one that is, is known.
    for opcode in 0..=255_u8 {
        let exists = entries.iter().any(|entry| entry[0] == opcode);
        let mut cdb = [0xff; 16];
        cdb[0] = opcode;
        let answer = bench.command(&cdb);
        let unknown = answer.outcome.status == Status::CheckCondition
            && answer.sense().1 == Code::INVALID_OPERATION_CODE;
        assert_eq!(unknown, !exists, "{opcode:#x}");
    }
}

#[test]
fn task_management_is_what_the_transport_has() {
    let bench = Bench::new();
    let data = bench.ask(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0]);
    assert_eq!(data.assert_good().data, [0xd8, 1, 0, 0]);
    let data = bench.ask(&[0xa3, 0x0d, 0x80, 0, 0, 0, 0, 0, 0, 64, 0, 0]);
    assert_eq!(data.assert_good().data[..4], [0xd8, 1, 0, 12]);
    assert_eq!(data.data.len(), 16);
    bench.refuses(&[(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0], (6, None))]);
}

fn groups(state: PortState) -> Vec<PortGroup> {
    vec![
        PortGroup {
            id: 1,
            state,
            preferred: true,
            ports: vec![1],
        },
        PortGroup {
            id: 2,
            state: PortState::Optimized,
            preferred: false,
            ports: vec![2, 3],
        },
    ]
}

#[test]
fn ports_are_reported_and_their_states_act() {
    let plain = Bench::new();
    let report = |bench: &Bench, format: u8| bench.ask(&[0xa3, 0x0a | format, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(report(&plain, 0).sense().1, Code::INVALID_FIELD_IN_CDB);
    let bench = Bench::with(UnitOptions {
        port_groups: groups(PortState::NonOptimized),
        ..options()
    });
    assert_eq!(bench.ask(&[0x12, 0, 0, 0, 255, 0]).data[5] & 0x30, 0x10);
    assert!(vital(&bench, 0x83).ends_with(&[1, 0x15, 0, 4, 0, 0, 0, 1]));
    let expected = [
        &[0, 0, 0, 28][..],
        &[0x81, 0x8f, 0, 1, 0, 2, 0, 1, 0, 0, 0, 1],
        &[0x00, 0x8f, 0, 2, 0, 2, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3],
    ];
    assert_eq!(report(&bench, 0).assert_good().data, expected.concat());
    assert_eq!(report(&bench, 0x20).assert_good().data[4..8], [0x10, 0, 0, 0]);
    report(&bench, 0x40).assert_field(true, (1, Some(7)));
    let other = Nexus::new(TransportId::sas(2), 2);
    bench.by(&other, &[0; 6], &[], 0);
    for (state, code) in [
        (PortState::Standby, Code::NOT_READY_STANDBY),
        (PortState::Unavailable, Code::NOT_READY_UNAVAILABLE),
        (PortState::Transitioning, Code::NOT_READY_TRANSITION),
    ] {
        bench.unit.set_port_groups(groups(state));
        assert_eq!(
            bench.ask(&ten(0x28, 0, 0, 1)).sense().1,
            Code::ASYMMETRIC_ACCESS_CHANGED
        );
        bench.ask(&ten(0x28, 0, 0, 1)).assert_sense(Key::NotReady, code);
        report(&bench, 0).assert_good();
        bench.ask(&[0x12, 0, 0, 0, 36, 0]).assert_good();
        let informs = bench.ask(&[0x1a, 0, 8, 0, 255, 0]).outcome.status == Status::Good;
        assert_eq!(informs, state == PortState::Standby);
        // The other way is open.
        bench.by(&other, &[0; 6], &[], 0);
        bench.by(&other, &ten(0x28, 0, 0, 1), &[], 512).assert_good();
    }
}

/// Answers with the nexus' port.
#[derive(Debug)]
struct Vendor;

impl VendorCommands for Vendor {
    fn execute<'a>(
        &'a self,
        unit: &'a Unit,
        _: &'a Nexus,
        command: &'a Command<'a>,
    ) -> Pin<Box<dyn Future<Output = Outcome> + 'a>> {
        Box::pin(async move {
            match command.cdb[1] {
                0 => Outcome::done(0, 0),
                _ => Outcome::failed(unit, Sense::illegal(Code::INVALID_FIELD_IN_CDB)),
            }
        })
    }

    fn page(&self, _: &Unit, nexus: &Nexus) -> Vec<u8> {
        nexus.target_port().to_be_bytes().to_vec()
    }
}

#[test]
fn vendor_commands_are_only_where_somebody_does_them() {
    let plain = Bench::new();
    for opcode in VENDOR_OPCODES {
        let answer = plain.command(&[opcode; 16]);
        answer.assert_sense(Key::IllegalRequest, Code::INVALID_OPERATION_CODE);
    }
    let bench = Bench::with(UnitOptions {
        vendor: Some(std::sync::Arc::new(Vendor)),
        ..options()
    });
    bench.command(&[0xc0, 0]).assert_good();
    assert_eq!(bench.command(&[0xc1, 1]).sense().1, Code::INVALID_FIELD_IN_CDB);
    bench
        .command(&[0xc2; 16])
        .assert_sense(Key::IllegalRequest, Code::INVALID_OPERATION_CODE);
    assert_eq!(vital(&bench, VENDOR_PAGE), [0, 1]);
    assert_eq!(vital(&bench, 0).last(), Some(&VENDOR_PAGE));
    let one = bench.ask(&[0xa3, 0x0c, 1, 0xc0, 0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(one.assert_good().data[1..5], [3, 0, 16, 0xc0]);
    // Unit attentions come first.
    bench.unit.capacity_changed();
    bench
        .command(&[0xc0, 0])
        .assert_sense(Key::UnitAttention, Code::CAPACITY_CHANGED);
}
