//! The ACPI tables as a guest finds them: golden files, checksums, and what ACPICA's own tools make of them.
//!
//! `GOLDEN=update cargo test -p vmm --test acpi` writes the golden files anew; look at the difference before you commit.
//! Tests that need ACPICA (`apt install acpica-tools`) say so and end where it is not installed.

#![allow(clippy::unwrap_used, clippy::expect_used)] // also in the tests' helpers

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::{
    acpi::{self, AcpiError, AcpiInputs, AcpiTables, RealTimeClock},
    layout,
};

/// A machine whose tables are kept as golden files.
struct Machine {
    name: &'static str,
    cpus: u32,
    ram_size: u64,
    serial: bool,
    rtc: RealTimeClock,
    pvpanic: bool,
    hotplug_slots: u32,
}

const MACHINES: [Machine; 4] = [
    Machine {
        name: "bare",
        cpus: 1,
        ram_size: 128 << 20,
        serial: false,
        rtc: RealTimeClock::Absent,
        pvpanic: false,
        hotplug_slots: 0,
    },
    Machine {
        name: "usual",
        cpus: 2,
        ram_size: 5 << 30,
        serial: true,
        rtc: RealTimeClock::Ports,
        pvpanic: true,
        hotplug_slots: 0xFF00,
    },
    Machine {
        name: "full",
        cpus: 64,
        ram_size: 300 << 30,
        serial: true,
        rtc: RealTimeClock::PortsAndInterrupt,
        pvpanic: true,
        hotplug_slots: u32::MAX,
    },
    // What `smsvmm run` makes; a story compares it with what a guest finds (tests/tests/platform.rs).
    Machine {
        name: "story",
        cpus: 2,
        ram_size: 256 << 20,
        serial: true,
        rtc: RealTimeClock::Absent,
        pvpanic: true,
        hotplug_slots: !1,
    },
];

impl Machine {
    fn tables(&self) -> AcpiTables {
        let apic_ids: Vec<u32> = (0..self.cpus).collect();
        acpi::build(&AcpiInputs {
            apic_ids: &apic_ids,
            mmio64: layout::mmio64_window(self.ram_size, 46).unwrap(),
            serial: self.serial,
            rtc: self.rtc,
            pvpanic: self.pvpanic,
            hotplug_slots: self.hotplug_slots,
        })
        .unwrap()
    }
}

fn bytes_of(tables: &AcpiTables, signature: &str) -> Vec<u8> {
    let table = tables.iter().find(|table| table.signature == signature);
    table.expect("the table exists").bytes.clone()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap())
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap())
}

#[test]
fn a_guest_finds_every_table_by_its_pointer_with_a_right_checksum() {
    for machine in MACHINES {
        let tables = machine.tables();
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        tables.write_to(&memory).unwrap();
        let read = |address: u64, length: usize| {
            let mut bytes = vec![0; length];
            memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        };
        let read_table = |address: u64| {
            assert!(address.is_multiple_of(16));
            let length = u32_at(&read(address, 36), 4) as usize;
            let table = read(address, length);
            assert_eq!(
                sum(&table),
                0,
                "{}: checksum of the table at {address:#x}",
                machine.name
            );
            table
        };

        // What a legacy scan does: the signature on a 16-byte boundary, the sums of the first 20 and of all 36 bytes.
        let rsdp = (0xE_0000..0x10_0000)
            .step_by(16)
            .find(|&address| read(address, 8) == b"RSD PTR ")
            .unwrap();
        assert_eq!(rsdp, tables.rsdp());
        let rsdp = read(rsdp, 36);
        assert_eq!((rsdp[15], u32_at(&rsdp, 20)), (2, 36), "revision and length");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));

        let xsdt = read_table(u64_at(&rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let listed: Vec<_> = xsdt[36..]
            .chunks(8)
            .map(|entry| read_table(u64_at(entry, 0)))
            .collect();
        let signatures: Vec<_> = listed.iter().map(|table| table[..4].to_vec()).collect();
        assert_eq!(signatures, [b"FACP", b"APIC", b"MCFG"]);
        assert_eq!(
            &read_table(u64_at(&listed[0], 140))[..4],
            b"DSDT",
            "X_DSDT of the FADT"
        );
    }
}

#[test]
fn tables_do_not_overlap_and_stay_in_their_area() {
    for machine in MACHINES {
        let tables = machine.tables();
        let mut end = layout::ACPI_TABLES.start;
        for table in tables.iter() {
            assert!(table.address >= end, "{} of {}", table.signature, machine.name);
            end = table.address + table.bytes.len() as u64;
        }
        assert!(end <= layout::ACPI_TABLES.end());
        println!("{}: {} bytes", machine.name, end - layout::ACPI_TABLES.start);
    }
}

#[test]
fn too_many_processors_are_refused() {
    let build = |count: u32| {
        let apic_ids: Vec<u32> = (0..count).collect();
        acpi::build(&AcpiInputs {
            apic_ids: &apic_ids,
            mmio64: layout::mmio64_window(1 << 30, 40).unwrap(),
            serial: true,
            rtc: RealTimeClock::Absent,
            pvpanic: false,
            hotplug_slots: 0,
        })
    };
    assert!(build(2048).is_ok());
    assert!(matches!(build(4096), Err(AcpiError::TooLarge { .. })));
    assert!(matches!(
        build(4097),
        Err(AcpiError::TooManyProcessors { count: 4097 })
    ));
}

#[test]
fn writing_into_a_hole_names_the_table() {
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0xE_0000)]).unwrap();
    let error = MACHINES[0].tables().write_to(&memory).unwrap_err();
    assert_eq!(
        error.to_string(),
        "cannot write ACPI table RSDP to guest address 0xe0000"
    );
}

#[test]
fn madt_lists_each_processor_once_with_its_apic_id() {
    let apic_ids: Vec<u32> = (0..300).map(|index| index * 2).collect();
    let tables = acpi::build(&AcpiInputs {
        apic_ids: &apic_ids,
        mmio64: layout::mmio64_window(1 << 30, 40).unwrap(),
        serial: true,
        rtc: RealTimeClock::Absent,
        pvpanic: false,
        hotplug_slots: 0,
    })
    .unwrap();

    let madt = bytes_of(&tables, "APIC");
    assert_eq!(u32_at(&madt, 36), 0xFEE0_0000);
    let mut found = Vec::new();
    let mut io_apic = None;
    let mut rest = &madt[44..];
    while let [kind, length, ..] = *rest {
        let (entry, after) = rest.split_at(usize::from(length));
        match kind {
            0 => found.push((u32::from(entry[2]), u32::from(entry[3]), u32_at(entry, 4))),
            9 => found.push((u32_at(entry, 12), u32_at(entry, 4), u32_at(entry, 8))),
            1 => io_apic = Some((entry[2], u32_at(entry, 4), u32_at(entry, 8))),
            4 | 10 => {}
            other => panic!("unexpected MADT structure {other}"),
        }
        rest = after;
    }
    let expected: Vec<_> = (0..).zip(&apic_ids).map(|(uid, &id)| (uid, id, 1)).collect();
    assert_eq!(found, expected);
    assert_eq!(io_apic, Some((0, 0xFEC0_0000, 0)));
}

#[test]
fn the_io_apic_has_the_id_behind_the_processors() {
    let madt = bytes_of(&MACHINES[1].tables(), "APIC");
    assert_eq!(madt[44 + 2 * 8..][..4], [1, 12, 2, 0]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Golden files
// ---------------------------------------------------------------------------------------------------------------------

fn golden_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Compares with the golden file, or writes it.
fn check_golden(name: &str, actual: &[u8]) {
    let path = golden_directory().join(name);
    if std::env::var_os("GOLDEN").is_some_and(|value| value == "update") {
        fs::write(&path, actual).unwrap();
    }
    let expected = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(
        expected == actual,
        "{} differs from what is built now; if that is meant, GOLDEN=update writes it anew",
        path.display()
    );
}

#[test]
fn tables_are_as_the_golden_files_have_them() {
    for machine in MACHINES {
        for table in machine.tables().iter() {
            check_golden(
                &format!("{}-{}.aml", machine.name, table.signature.to_lowercase()),
                &table.bytes,
            );
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// ACPICA
// ---------------------------------------------------------------------------------------------------------------------

/// Runs one of ACPICA's tools in `directory`; `None` where it is not installed.
fn acpica(tool: &str, directory: &Path, arguments: &[&str]) -> Option<Output> {
    match Command::new(tool)
        .args(arguments)
        .current_dir(directory)
        .env("TZ", "UTC")
        .output()
    {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{tool} is not installed (apt install acpica-tools): nothing is tested here");
            None
        }
        Err(error) => panic!("{tool}: {error}"),
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A disassembly without its header, which has dates and versions.
fn without_header(disassembly: &str) -> String {
    let body = disassembly
        .find("DefinitionBlock")
        .or_else(|| disassembly.find("\n[000h"));
    disassembly[body.unwrap_or(0)..].to_owned()
}

#[test]
fn iasl_disassembles_every_table_and_assembles_it_again_without_complaint() {
    // Another version of iasl may comment differently; the golden disassembly is compared with this one's only,
    // and kept for one machine, to be read by people.
    const VERSION: &str = "20200925";
    for machine in MACHINES {
        for table in machine.tables().iter().filter(|table| table.signature != "RSDP") {
            let name = format!("{}-{}", machine.name, table.signature.to_lowercase());
            let directory = tempfile::tempdir().unwrap();
            fs::write(directory.path().join("table.aml"), &table.bytes).unwrap();

            let Some(output) = acpica("iasl", directory.path(), &["-d", "table.aml"]) else {
                return;
            };
            let complaints = text(&output);
            assert!(output.status.success(), "{name}: {complaints}");
            for word in ["Warning", "Error", "Invalid", "unresolved", "**"] {
                assert!(!complaints.contains(word), "{name}: {complaints}");
            }
            let disassembly = fs::read_to_string(directory.path().join("table.dsl")).unwrap();
            assert!(!disassembly.contains("Incorrect"), "{name}:\n{disassembly}");
            if complaints.contains(VERSION) && machine.name == "usual" {
                check_golden(&format!("{name}.dsl"), without_header(&disassembly).as_bytes());
            }

            let output = acpica("iasl", directory.path(), &["-oa", "-p", "again", "table.dsl"]).unwrap();
            let complaints = text(&output);
            assert!(output.status.success(), "{name}: {complaints}");
            assert!(!complaints.contains("Warning "), "{name}: {complaints}");
            assert!(!complaints.contains("Error "), "{name}: {complaints}");
            let again = fs::read(directory.path().join("again.aml")).unwrap();
            // Behind the header, in which iasl notes itself as the creator.
            assert!(
                again[36..] == table.bytes[36..],
                "{name}: assembled again, it is different"
            );
        }
    }
}

/// Has ACPICA's interpreter load the DSDT of `machine` and evaluate `call`; every register reads as `fill` in all bytes.
fn evaluate(machine: &Machine, fill: u8, call: &str) -> Option<String> {
    let directory = tempfile::tempdir().unwrap();
    fs::write(
        directory.path().join("dsdt.aml"),
        bytes_of(&machine.tables(), "DSDT"),
    )
    .unwrap();
    let command = format!("evaluate {call}");
    let arguments = ["-vr", "-fv", &format!("{fill:#x}"), "-b", &command, "dsdt.aml"];
    let output = acpica("acpiexec", directory.path(), &arguments)?;
    let said = text(&output);
    for word in ["AE_", "Exception", "Error", "Warning", "Unknown option"] {
        assert!(!said.contains(word), "{call}: {said}");
    }
    Some(said)
}

/// The notifications in what the interpreter says: object and value. Sorted, as it hands them out in threads of its own.
fn notifications(said: &str) -> Vec<(String, u32)> {
    let mut all: Vec<_> = said
        .lines()
        .filter_map(|line| line.split_once("Notify on ["))
        .map(|(_, rest)| {
            let (object, rest) = rest.split_once(']').unwrap();
            let (_, value) = rest.split_once("Value 0x").unwrap();
            let value = value.split_once(' ').unwrap().0;
            (object.to_owned(), u32::from_str_radix(value, 16).unwrap())
        })
        .collect();
    all.sort();
    all
}

/// How often the interpreter touched a register: each would be a VM exit.
fn accesses(said: &str) -> usize {
    said.matches("Region access").count()
}

#[test]
fn loading_the_namespace_evaluates_no_method_and_touches_no_register() {
    for machine in MACHINES {
        let Some(said) = evaluate(&machine, 0, "\\_S5") else {
            return;
        };
        assert!(
            said.contains("Executed 0 _INI methods requiring 0 _STA executions"),
            "{said}"
        );
        assert!(said.contains("[Integer] = 0000000000000005"), "{said}");
        assert_eq!(accesses(&said), 0);
    }
}

#[test]
fn the_event_method_tells_of_what_the_register_says_and_nothing_else() {
    let [bare, usual, ..] = MACHINES;
    let event = |machine, status| {
        let said = evaluate(machine, status, "\\_SB.GED._EVT 5")?;
        Some((accesses(&said), notifications(&said)))
    };
    let Some(nothing) = event(&usual, 0) else {
        return;
    };
    assert_eq!(nothing, (1, vec![]));

    let button = ("PWRB".to_owned(), 0x80);
    assert_eq!(event(&usual, 1), Some((1, vec![button.clone()])));
    // Bit 1 in every byte of every register: slot 9 of those that are there, as new, then as wanted back.
    let slot = |event| ("S09_".to_owned(), event);
    assert_eq!(event(&usual, 2), Some((3, vec![slot(1), slot(3)])));
    assert_eq!(
        event(&bare, 3),
        Some((1, vec![button])),
        "without slots there is the button only"
    );
}

#[test]
fn the_host_bridge_grants_everything_but_hotplug() {
    let uuid = |last| format!("(5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 {last:02X})");
    let ask = |uuid: String, revision: u32, control: &str| {
        let call =
            format!("\\_SB.PCI0._OSC {uuid} {revision} 3 (00 00 00 00 1F 00 00 00 {control} 00 00 00)");
        let said = evaluate(&MACHINES[1], 0, &call)?;
        let (_, answer) = said.split_once("0000: ").unwrap();
        Some(answer[..36].trim_end().to_owned())
    };
    let Some(masked) = ask(uuid(0x66), 1, "1F") else {
        return;
    };
    assert_eq!(
        masked, "10 00 00 00 1F 00 00 00 1C 00 00 00",
        "capabilities masked"
    );
    let granted = ask(uuid(0x66), 1, "1C").unwrap();
    assert_eq!(granted, "00 00 00 00 1F 00 00 00 1C 00 00 00");
    let revision = ask(uuid(0x66), 2, "1C").unwrap();
    assert_eq!(
        revision, "08 00 00 00 1F 00 00 00 1C 00 00 00",
        "unknown revision"
    );
    let other = ask(uuid(0x67), 1, "1F").unwrap();
    assert_eq!(other, "04 00 00 00 1F 00 00 00 1F 00 00 00", "unknown UUID");
}

#[test]
fn ejecting_is_one_access() {
    for slot in ["S01", "S1F"] {
        let Some(said) = evaluate(&MACHINES[2], 0, &format!("\\_SB.PCI0.{slot}._EJ0 1")) else {
            return;
        };
        assert_eq!(accesses(&said), 1);
    }
}
