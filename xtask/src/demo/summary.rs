//! What the demo has shown so far, and how long each part took.

use std::time::Instant;

/// The parts of the demo, in order.
pub(super) struct Summary {
    stops: Vec<Stop>,
    last: Instant,
}

struct Stop {
    title: &'static str,
    result: String,
    seconds: f64,
}

impl Summary {
    pub(super) fn new() -> Self {
        Self {
            stops: Vec::new(),
            last: Instant::now(),
        }
    }

    /// A part is over.
    pub(super) fn stop(&mut self, title: &'static str, result: String) {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        self.stops.push(Stop {
            title,
            result,
            seconds,
        });
    }

    pub(super) fn print(&self) {
        println!("\n\nSummary");
        for Stop {
            title,
            result,
            seconds,
        } in &self.stops
        {
            println!("  {seconds:6.1} s  {title:<20}  {result}");
        }
    }
}
