//! Every kind of fault can be seen, and the policy limits the random ones.

use block_io::sim::{
    AtMostDevices, DiskOptions, Fault, FaultPlan, FaultPolicy, FaultRates, FaultRule, Hit, Numbers,
    RunOptions, Sim, World,
};
use block_io::{BlockDevice, Clock, Durability, IoCause, IoError, Operation};

const SIZE: u64 = 1 << 20;
const EIO: i32 = 5;
const ENODEV: i32 = 19;

fn simulate<T>(test: impl AsyncFnOnce(Sim) -> T) -> T {
    let mut world = World::new([DiskOptions::new("disk", SIZE)]);
    world
        .run(&RunOptions::in_order(), |sim| test(sim))
        .unwrap()
        .ended
        .done()
        .unwrap()
}

fn errno(result: Result<impl Sized, IoError>) -> i32 {
    match result.err().unwrap().cause() {
        IoCause::Os(error) => error.raw_os_error().unwrap(),
        other => panic!("{other}"),
    }
}

#[test]
fn an_error_comes_once_or_for_ever_and_only_where_it_was_put() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        sim.inject(0, FaultRule::once(Fault::Error, Operation::Read).after(1));
        sim.inject(
            0,
            FaultRule::always(Fault::Error, Operation::Write).within(4096..8192),
        );
        assert!(disk.read_bytes(0, 512).await.is_ok());
        assert_eq!(errno(disk.read_bytes(0, 512).await), EIO);
        assert!(disk.read_bytes(0, 512).await.is_ok());
        for _ in 0..3 {
            assert_eq!(
                errno(disk.write_bytes(3584, &[1; 1024], Durability::Volatile).await),
                EIO
            );
        }
        assert!(
            disk.write_bytes(8192, &[1; 512], Durability::Volatile)
                .await
                .is_ok()
        );
    });
}

#[test]
fn bit_rot_changes_one_bit_in_silence() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(0, &[0; 512], Durability::Durable).await.unwrap();
        sim.inject(0, FaultRule::once(Fault::BitRot, Operation::Read));
        let first = disk.read_bytes(0, 512).await.unwrap();
        let ones: u32 = first.iter().map(|byte| byte.count_ones()).sum();
        assert_eq!(ones, 1);
        assert_eq!(disk.read_bytes(0, 512).await.unwrap(), first);
    });
}

#[test]
fn a_lost_write_is_reported_as_done() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        sim.inject(0, FaultRule::once(Fault::LostWrite, Operation::Write));
        disk.write_bytes(0, &[1; 512], Durability::Durable).await.unwrap();
        assert_eq!(disk.read_bytes(0, 512).await.unwrap()[0], 0);
    });
}

#[test]
fn a_misdirected_write_hits_another_place() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        sim.inject(
            0,
            FaultRule::always(Fault::MisdirectedWrite(1024), Operation::Write),
        );
        disk.write_bytes(0, &[1; 512], Durability::Durable).await.unwrap();
        disk.write_bytes(SIZE - 512, &[2; 512], Durability::Durable)
            .await
            .unwrap();
        assert_eq!(disk.read_bytes(0, 512).await.unwrap()[0], 0);
        assert_eq!(disk.read_bytes(1024, 512).await.unwrap()[0], 1);
        assert_eq!(disk.read_bytes(512, 512).await.unwrap()[0], 2);
    });
}

#[test]
fn a_full_disk_takes_writes_only_where_it_has_space() {
    let mut options = DiskOptions::new("disk", SIZE);
    options.capacity = Some(1);
    let mut world = World::new([options]);
    let run = world.run(&RunOptions::random(1), async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(0, &[1; 512], Durability::Volatile)
            .await
            .unwrap();
        let full = disk.write_bytes(8192, &[1; 512], Durability::Volatile).await;
        assert!(full.unwrap_err().is_no_space());
        disk.write_bytes(512, &[1; 512], Durability::Volatile)
            .await
            .unwrap();
    });
    run.unwrap();
}

#[test]
fn a_dropped_disk_answers_nothing_until_it_is_back() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(0, &[1; 512], Durability::Durable).await.unwrap();
        sim.inject(0, FaultRule::once(Fault::Drop, Operation::Read));
        assert_eq!(errno(disk.read_bytes(0, 512).await), ENODEV);
        assert_eq!(errno(disk.flush().await), ENODEV);
        sim.attach(0);
        assert_eq!(disk.read_bytes(0, 512).await.unwrap()[0], 1);
    });
}

#[test]
fn a_stale_disk_returns_with_old_content() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        disk.write_bytes(0, &[1; 512], Durability::Durable).await.unwrap();
        let old = sim.with_medium(0, |medium| medium.clone());
        disk.write_bytes(0, &[2; 512], Durability::Durable).await.unwrap();
        sim.replace(0, old);
        assert_eq!(disk.read_bytes(0, 512).await.unwrap()[0], 1);
    });
}

#[test]
fn a_slow_disk_takes_its_time() {
    simulate(async |sim| {
        let disk = sim.disk(0);
        disk.flush().await.unwrap();
        let normal = sim.clock().now();
        sim.inject(0, FaultRule::once(Fault::Slow(50), Operation::Flush));
        disk.flush().await.unwrap();
        assert_eq!(sim.clock().now(), normal * 51);
    });
}

/// Writes and reads on two disks as a mirror does.
async fn mirror(sim: Sim) {
    let legs = sim.disks();
    for round in 0..200_u8 {
        let mut written = 0;
        for leg in &legs {
            written += u32::from(
                leg.write_bytes(0, &[round; 512], Durability::Durable)
                    .await
                    .is_ok(),
            );
        }
        assert!(written > 0, "both legs failed");
    }
}

#[test]
fn random_faults_stay_within_the_policy() {
    let rates = FaultRates {
        error: 20_000,
        drop: 500,
        slow: 1000,
        ..FaultRates::default()
    };
    let mut numbers = Numbers::default();
    numbers.collect();
    numbers = Numbers::default();
    for seed in 0..20 {
        let mut world = World::new(["left", "right"].map(|name| DiskOptions::new(name, SIZE)));
        world.faults = FaultPlan::new(rates, AtMostDevices::new(1));
        world.run(&RunOptions::random(seed), mirror).unwrap();
    }
    numbers.collect();
    println!("{numbers}");
    assert!(
        numbers.faults["error"] > 100 && numbers.faults["dropped device"] > 5,
        "{numbers}"
    );

    let broken = (0..20).any(|seed| {
        let mut world = World::new(["left", "right"].map(|name| DiskOptions::new(name, SIZE)));
        world.faults = FaultPlan::new(rates, AtMostDevices::new(2));
        world.run(&RunOptions::random(seed), mirror).is_err()
    });
    assert!(broken, "two failing legs are too many");
}

#[test]
fn a_healed_disk_makes_room_for_damage_elsewhere() {
    let mut policy = AtMostDevices::new(1);
    let hit = |disk| Hit {
        disk,
        fault: Fault::Error,
        range: 0..512,
    };
    assert!(policy.allows(&hit(0)) && !policy.allows(&hit(1)) && policy.allows(&hit(0)));
    policy.healed(0);
    assert!(policy.allows(&hit(1)) && !policy.allows(&hit(0)));
}
