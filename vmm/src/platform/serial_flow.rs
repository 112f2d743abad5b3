//! Test: much text through the serial port, both ways, with a driver that behaves as Linux' 8250 does.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::serial::Serial;
use crate::bus::BusDevice;
use crate::console::testing::{Bench, PATIENCE, text};

/// A driver's view of the port, which counts VM exits.
struct Driver {
    serial: Arc<Serial>,
    interrupts: Receiver<()>,
    exits: AtomicU64,
}

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const FCR: u64 = 2;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;

impl Driver {
    /// Opens the port as Linux does: FIFOs cleared, receive interrupt on, RTS and DTR on.
    fn open(bench: &Bench) -> Self {
        let (edge, interrupts): (Sender<()>, _) = channel();
        let interrupt = Arc::new(move || edge.send(()).unwrap_or_default());
        let driver = Self {
            serial: Serial::new(bench.handle(), interrupt),
            interrupts,
            exits: AtomicU64::new(0),
        };
        driver.write(FCR, 0x07);
        driver.write(FCR, 0x01);
        let _ = (
            driver.read(LSR),
            driver.read(DATA),
            driver.read(IIR),
            driver.read(MSR),
        );
        driver.write(IER, 0x05);
        driver.write(MCR, 0x0b);
        driver
    }

    fn read(&self, register: u64) -> u8 {
        self.exits.fetch_add(1, Ordering::Relaxed);
        let mut data = [0];
        self.serial.read(register, &mut data);
        data[0]
    }

    fn write(&self, register: u64, value: u8) {
        self.exits.fetch_add(1, Ordering::Relaxed);
        self.serial.write(register, &[value]);
    }

    /// Waits for an edge of the interrupt line, then serves the port until it has nothing more: at most 256 bytes in and 16 out
    /// per round. `output` is sent; what comes is appended to `input`.
    fn serve(&self, output: &mut &[u8], input: &mut Vec<u8>) {
        self.interrupts
            .recv_timeout(PATIENCE)
            .expect("the port is silent: an interrupt was lost");
        while self.read(IIR) & 1 == 0 {
            let mut status = self.read(LSR);
            let mut burst = 256;
            while status & 1 != 0 && burst > 0 {
                input.push(self.read(DATA));
                status = self.read(LSR);
                burst -= 1;
            }
            let _ = self.read(MSR);
            if status & 0x20 != 0 && !output.is_empty() {
                let (load, rest) = output.split_at(output.len().min(16));
                load.iter().for_each(|byte| self.write(DATA, *byte));
                *output = rest;
                if output.is_empty() {
                    self.write(IER, 0x05);
                }
            }
        }
    }
}

#[test]
fn a_mebibyte_each_way_arrives_whole() {
    let (input, mut keyboard) = io::pipe().unwrap();
    let (mut screen, output) = io::pipe().unwrap();
    let bench = Bench::on(&input, &output);
    let driver = Driver::open(&bench);
    let sent = text(1 << 20);

    let typed = sent.clone();
    let typist = std::thread::spawn(move || keyboard.write_all(&typed).map(|()| keyboard).unwrap());
    let shown = sent.clone();
    let reader = std::thread::spawn(move || {
        let mut seen = vec![0; shown.len()];
        for chunk in seen.chunks_mut(8 << 10) {
            // Slower than the guest, so that output has to be held back.
            std::thread::sleep(Duration::from_millis(2));
            screen.read_exact(chunk).unwrap();
        }
        assert!(seen == shown);
    });

    let (mut output, mut received) = (&sent[..], Vec::new());
    driver.write(IER, 0x07);
    while !output.is_empty() || received.len() < sent.len() {
        driver.serve(&mut output, &mut received);
    }
    assert!(received == sent);
    reader.join().unwrap();
    drop(typist.join().unwrap());
    bench.assert_idle();
}

#[test]
fn a_printed_character_costs_little_more_than_an_exit() {
    let (input, _keyboard) = io::pipe().unwrap();
    let (mut screen, output) = io::pipe().unwrap();
    let bench = Bench::on(&input, &output);
    let driver = Driver::open(&bench);
    let sent = text(64 << 10);
    let length = sent.len();
    let reader = std::thread::spawn(move || screen.read_exact(&mut vec![0; length]).unwrap());

    let before = driver.exits.load(Ordering::Relaxed);
    let (mut output, mut received) = (&sent[..], Vec::new());
    driver.write(IER, 0x07);
    while !output.is_empty() {
        driver.serve(&mut output, &mut received);
    }
    let exits = driver.exits.load(Ordering::Relaxed) - before;
    reader.join().unwrap();
    // 16 bytes, IIR, LSR, MSR, for each load.
    assert!(
        exits <= (length as u64) * 19 / 16 + 64,
        "{exits} exits for {length} characters"
    );
}

#[test]
fn a_kernel_that_prints_by_polling_never_waits_for_a_stuck_reader() {
    let (input, _keyboard) = io::pipe().unwrap();
    let (_screen, output) = io::pipe().unwrap();
    let bench = Bench::on(&input, &output);
    let driver = Driver::open(&bench);
    for _ in 0..2 << 20 {
        assert_eq!(driver.read(LSR) & 0x60, 0x60);
        driver.write(DATA, b'x');
    }
}
