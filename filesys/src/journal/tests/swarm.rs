//! Long random histories: rings that go round many times, blocks torn at sectors, crashes in everything.

use block_io::sim::{Ended, Failure, Rng, RunOptions, Scenario, Shared, SwarmOptions, Workload, swarm};

use super::crash::{Open, Promise, Script, Step};
use super::*;

#[derive(Debug, Clone)]
enum Event {
    Do(Step),
    /// The power is cut after so many more events.
    Crash(u64),
}

struct Histories;

async fn work(sim: Sim, promise: Shared<Promise>, events: Vec<Event>) -> Result<(), Failure> {
    let mut open = Open::open(&sim, &promise).await?;
    for event in events {
        let Event::Do(step) = event else { continue };
        if let Err(failure) = open.step(step).await {
            if failure.message != "no room" {
                return Err(failure);
            }
            open.step(Step::Checkpoint).await?;
        }
    }
    Ok(())
}

impl Workload for Histories {
    type Step = Event;

    fn generate(&self, rng: &mut Rng) -> Vec<Event> {
        (0..60)
            .map(|_| match rng.below(12) {
                0 | 1 => Event::Crash(rng.below(40)),
                2 => Event::Do(Step::Checkpoint),
                3..7 => Event::Do(Step::Commit),
                7 => Event::Do(Step::Append(4032 * 2 + rng.index(4000))),
                8 => Event::Do(Step::Append(4032)),
                _ => Event::Do(Step::Append(8 + rng.index(3000))),
            })
            .collect()
    }

    fn run(&self, seed: u64, history: &[Event]) -> Result<(), Failure> {
        let mut rng = Rng::new(seed);
        let script = Script {
            steps: &[],
            ring: 5 + rng.below(6),
            sector: 512,
            fails: None,
        };
        let mut world = script.world();
        let promise = Shared::<Promise>::default();
        let made = world.run(&RunOptions::in_order(), |sim| {
            script.prepare(sim, Rc::clone(&promise))
        })?;
        made.ended.done().unwrap_or(Ok(()))?;
        let mut parts: Vec<(Vec<Event>, Option<u64>)> = vec![(Vec::new(), None)];
        for event in history {
            let Some((events, crash)) = parts.last_mut() else {
                break;
            };
            match event {
                Event::Crash(after) => {
                    *crash = Some(*after);
                    parts.push((Vec::new(), None));
                }
                event => events.push(event.clone()),
            }
        }
        for (events, crash) in parts {
            let mut options = RunOptions::random(rng.next_u64());
            if let Some(after) = crash {
                options = options.crash_after(10 + after);
            }
            let ran = world.run(&options, |sim| work(sim, Rc::clone(&promise), events))?;
            if let Ended::Done(result) = ran.ended {
                result?;
            }
            world.crash(&mut rng);
        }
        Ok(())
    }
}

#[test]
fn long_histories_keep_what_was_acknowledged() {
    let options = SwarmOptions {
        seed: 11,
        histories: 3000,
    };
    let numbers = swarm(&Histories, &options).unwrap_or_else(|shrunk| panic!("{shrunk}"));
    println!("{numbers}");
    let missing = numbers.missing(&[
        "journal: a torn or damaged block",
        "journal: the last group is torn",
        "journal: a later incarnation goes on",
        "journal: a group goes across the ring's end",
        "superblock: a single newer copy is ignored",
    ]);
    assert!(missing.is_empty(), "{missing:?} were not reached: {numbers}");
}
