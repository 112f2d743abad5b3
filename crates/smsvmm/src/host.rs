//! `smsvmm host check`.

use serde::Serialize;
use vmm::host::{self, Finding};

use crate::exit::Exit;
use crate::output;

/// The report with its verdict.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Answer<'a> {
    can_boot: bool,
    findings: &'a [Finding],
}

pub(crate) fn check(json: bool) -> anyhow::Result<Exit> {
    let report = host::examine();
    let can_boot = report.can_boot();
    if json {
        output::print_json(&Answer {
            can_boot,
            findings: &report.findings,
        })?;
    } else {
        let verdict = if can_boot {
            "A stock guest can boot here."
        } else {
            "No stock guest can boot here; see FAIL above."
        };
        output::print(&format!("{report}\n{verdict}\n"))?;
    }
    Ok(if can_boot { Exit::Success } else { Exit::Failed })
}
