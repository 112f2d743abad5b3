//! How fast parity is per core, beside a copy in the same run: `cargo bench -p parity`.
//!
//! Gigabytes (10^9) that an operation reads, per second of this thread's CPU time, so that other load on the machine
//! disturbs little. `cached` repeats one stripe; `memory` goes round in stripes that no cache holds. Rounds of all
//! operations alternate, and the median round counts.

use std::time::Duration;

use parity::{Level, Parity};
use rustix::time::{ClockId, clock_gettime};

/// A stripe unit.
const UNIT: usize = 64 << 10;
/// What a guest's small write changes in a column.
const BLOCK: usize = 4 << 10;
/// Columns in a stripe of the bench: 8 of data, then 2 to write.
const COLUMNS: usize = 10;
const ROUNDS: usize = 7;
/// Bytes read in a round, about.
const ROUND: usize = 128 << 20;

/// One stripe's work: the columns to read, and two to write.
type Run = fn(Parity, &[&[u8]], &mut [u8], &mut [u8]);

/// What is measured: a name, how many columns it reads, and one stripe's work.
struct Operation {
    name: &'static str,
    reads: usize,
    run: Run,
}

const OPERATIONS: [Operation; 10] = [
    Operation {
        name: "memcpy",
        reads: 1,
        run: |_, data, p, _| p.copy_from_slice(data[0]),
    },
    Operation {
        name: "xor 4+1",
        reads: 4,
        run: |parity, data, p, _| parity.xor(p, &data[..4]),
    },
    Operation {
        name: "xor 8+1",
        reads: 8,
        run: |parity, data, p, _| parity.xor(p, &data[..8]),
    },
    Operation {
        name: "pq 4+2",
        reads: 4,
        run: |parity, data, p, q| parity.pq(p, q, &given::<4>(data, &[])),
    },
    Operation {
        name: "pq 8+2",
        reads: 8,
        run: |parity, data, p, q| parity.pq(p, q, &given::<8>(data, &[])),
    },
    // The columns in the opposite order of their addresses: prefetchers must not mind.
    Operation {
        name: "pq 4+2 reversed",
        reads: 4,
        run: |parity, data, p, q| parity.pq(p, q, &[3, 2, 1, 0].map(|index| Some(data[index]))),
    },
    Operation {
        name: "update Q",
        reads: 2,
        run: |parity, data, _, q| parity.update_q(q, 3, data[0]),
    },
    // Of 4+2: three data columns and P, three and Q, two and both are read. What they recover does not matter here.
    Operation {
        name: "4+2, data by P",
        reads: 4,
        run: |parity, data, out, _| parity.recover_from_p(out, data[4], &given::<4>(data, &[1])),
    },
    Operation {
        name: "4+2, data by Q",
        reads: 4,
        run: |parity, data, out, _| parity.recover_from_q(out, 1, data[4], &given::<4>(data, &[1])),
    },
    Operation {
        name: "4+2, two data",
        reads: 4,
        run: |parity, data, x, y| {
            parity.recover_two([x, y], [1, 2], data[4], data[5], &given::<4>(data, &[1, 2]));
        },
    },
];

fn given<'a, const N: usize>(data: &[&'a [u8]], lost: &[usize]) -> [Option<&'a [u8]>; N] {
    std::array::from_fn(|index| (!lost.contains(&index)).then_some(data[index]))
}

fn cpu_time() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// Gigabytes read per second of CPU time in one round over `stripes`.
fn measure(parity: Parity, operation: &Operation, column: usize, stripes: &mut [Vec<u8>]) -> f64 {
    let times = ROUND / (operation.reads * column);
    let start = cpu_time();
    for n in 0..times {
        let stripe = &mut stripes[n % stripes.len()];
        let (data, outputs) = stripe.split_at_mut((COLUMNS - 2) * column);
        let (first, second) = outputs[..2 * column].split_at_mut(column);
        let mut columns = [&[][..]; COLUMNS - 2];
        for (place, bytes) in columns.iter_mut().zip(data.chunks_exact(column)) {
            *place = bytes;
        }
        (operation.run)(parity, &columns, first, second);
        std::hint::black_box(outputs);
    }
    let seconds = (cpu_time() - start).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let bytes = (times * operation.reads * column) as f64;
    bytes / seconds / 1e9
}

fn table(title: &str, levels: &[Parity], column: usize, stripes: &mut [Vec<u8>]) {
    let mut rounds = vec![vec![Vec::new(); OPERATIONS.len()]; levels.len()];
    for _ in 0..ROUNDS {
        for (parity, results) in levels.iter().zip(&mut rounds) {
            for (operation, result) in OPERATIONS.iter().zip(results) {
                result.push(measure(*parity, operation, column, stripes));
            }
        }
    }
    println!("\n{title}: GB/s read per core, and as a ratio to memcpy in the same rows");
    print!("{:<14}", "");
    for operation in &OPERATIONS {
        print!(" {:>16}", operation.name);
    }
    println!();
    for (parity, results) in levels.iter().zip(rounds) {
        print!("{:<14}", parity.level());
        let medians: Vec<f64> = results.into_iter().map(median).collect();
        for median in &medians {
            print!(" {:>9.1} {:>6.2}", median, median / medians[0]);
        }
        println!();
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let levels: Vec<Parity> = Level::ALL.into_iter().filter_map(Parity::with_level).collect();
    // Different bytes in every column, and every page touched before the clock runs.
    let stripe = |seed: usize| -> Vec<u8> {
        (0..COLUMNS * UNIT)
            .map(|at| (at.wrapping_mul(seed + 1) >> 7).to_le_bytes()[0])
            .collect()
    };
    let mut stripes: Vec<Vec<u8>> = (0..400).map(stripe).collect();
    table(
        "cached, one stripe, columns of 64 KiB",
        &levels,
        UNIT,
        &mut stripes[..1],
    );
    table(
        "cached, one stripe, columns of 4 KiB",
        &levels,
        BLOCK,
        &mut stripes[..1],
    );
    table(
        "memory, 400 stripes, columns of 64 KiB",
        &levels,
        UNIT,
        &mut stripes,
    );
}
