// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a run has to say: one JSON object for programs, one table for people.

use std::fmt;

use comfy_table::{CellAlignment, Table, presets};
use notifier_core::Gpa;
use serde::Serialize;

use super::{
    cli::{MergeMode, Safety},
    table::{RawEntry, TableFormat},
};

/// A raw entry of a guest's table, before and after its page was merged. Numbers are in hexadecimal.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Sample {
    /// Which guest's table.
    pub guest: usize,
    /// The page.
    pub gpa: String,
    /// The architecture's number of the entry's level, after the change.
    pub level: i8,
    /// The entry before that: inside the window; in `zap` mode before the window, whose opening removes it.
    pub before: String,
    /// The entry inside the window, after it was changed.
    pub after: String,
}

impl Sample {
    pub(crate) fn new(guest: usize, gpa: Gpa, before: RawEntry, after: Option<RawEntry>) -> Self {
        let after = after.unwrap_or(RawEntry { raw: 0, ..before });
        Self {
            guest,
            gpa: format!("{gpa:#x}"),
            level: after.level,
            before: format!("{:#018x}", before.raw),
            after: format!("{:#018x}", after.raw),
        }
    }
}

/// What a run did. The JSON object has the fields up to `samples`, in this order.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What walked the tables.
    pub backend: &'static str,
    /// How translations followed: `change` or `zap`.
    pub mode: &'static str,
    /// Number of guests.
    pub guests: u32,
    /// Pages whose contents were hashed, again and again.
    pub pages_scanned: u64,
    /// Pages merged into a frame of the store, those included that were un-merged later.
    pub pages_merged: u64,
    /// Bytes that the merging saves at the end: pages that are merged, less the store's frames in use.
    pub bytes_saved: u64,
    /// Bytes that the host has back at the end: what the guests' memory lost since the start (blocks of memory files;
    /// private memory by smaps, on KVM), less the blocks of the store's file.
    pub bytes_returned: u64,
    /// Pages un-merged by a write.
    pub unmerged: u64,
    /// Windows refused because a device had a lease.
    pub vetoes: u64,
    /// Faults that lost to a window over their page and were begun again.
    pub retries: u64,
    /// Faults that lost to a window elsewhere: 0, always.
    pub unrelated_retries: u64,
    /// Pages that change_pte repointed.
    pub changes: u64,
    /// Pages removed from a table in place of that, or for a merge in `zap` mode.
    pub zaps: u64,
    /// Read faults on pages that were merged and not yet un-merged.
    pub refaults_after_merge: u64,
    /// Writes that were made and are not there any more.
    pub lost_writes: u64,
    /// Reads that saw what the page did not hold.
    pub stale_reads: u64,
    /// From the first vCPU's start until all had stopped.
    pub elapsed_ms: u64,
    /// Processor time of all threads in that time.
    pub cpu_ms: u64,
    /// Processor time of the merger.
    pub merger_cpu_ms: u64,
    /// Eight raw entries before and after their change.
    pub samples: Vec<Sample>,
    /// How often KVM came back from running a vCPU; on KVM only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm_exits: Option<u64>,
    /// Page faults of guests that KVM answered by itself, by its own count; on KVM only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kvm_page_faults: Option<u64>,
    /// What only the table says.
    #[serde(skip)]
    pub(crate) details: Details,
}

/// What only the table says.
#[derive(Debug, Clone)]
pub(crate) struct Details {
    pub(crate) safety: Safety,
    pub(crate) kvm: bool,
    /// The tables' format, where it was asked for.
    pub(crate) format: Option<TableFormat>,
    /// Why this back end, where that was left open.
    pub(crate) why: Option<String>,
    pub(crate) mem: u64,
    pub(crate) files: usize,
    pub(crate) times: usize,
    pub(crate) passes: u64,
    pub(crate) windows: u64,
    pub(crate) faults: u64,
    pub(crate) absent: u64,
    pub(crate) differed: u64,
    pub(crate) no_mapping: u64,
    pub(crate) host_failures: u64,
    pub(crate) stuck: u64,
    pub(crate) merged_now: u64,
    pub(crate) frames: u64,
    pub(crate) checks: u64,
    pub(crate) writes: u64,
    pub(crate) leases: u64,
    pub(crate) interrupted: bool,
}

impl Report {
    /// Whether the run was as it should be: no damage where the merger is safe, and some where it is not.
    pub fn as_it_should_be(&self) -> bool {
        (self.details.safety == Safety::Safe) == (self.lost_writes == 0 && self.stale_reads == 0)
    }

    /// The process's exit code. A run that was cut short has shown nothing about an unsafe merger.
    pub fn exit_code(&self) -> u8 {
        let unshown = self.details.interrupted && self.details.safety != Safety::Safe;
        if self.as_it_should_be() || unshown { 0 } else { 1 }
    }

    /// What is wrong with a run whose exit code is not 0, in one line.
    pub fn complaint(&self) -> &'static str {
        match self.details.safety {
            Safety::Safe => "a safe run lost writes or saw stale reads",
            _ => "an unsafe run did no harm: the check is blind, or the run too short",
        }
    }

    /// One JSON object, without line breaks.
    ///
    /// # Errors
    /// serde_json's; none is known for these fields.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

pub(crate) fn mode_name(mode: MergeMode) -> &'static str {
    match mode {
        MergeMode::Change => "change",
        MergeMode::Zap => "zap",
    }
}

/// Bytes in MiB, to one place.
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = &self.details;
        let merger = match d.safety {
            Safety::Safe => "safe",
            Safety::NoFence => "unsafe: compares before the window opens",
            Safety::NoNotify if d.kvm => "unsafe: tells devices of no un-merge",
            Safety::NoNotify => "unsafe: gives memory back with no window",
        };
        let backend = match &d.why {
            Some(why) => format!("{} ({why})", self.backend),
            None => self.backend.into(),
        };
        let times = if d.times > 1 { format!(", used {} times, varied", d.times) } else { String::new() };
        let ms = |ms: u64| format!("{:.2} s", ms as f64 / 1000.0);
        let mut rows = vec![
            ("back end, mode", format!("{backend}, {}", self.mode)),
            ("merger", merger.into()),
            ("guests", format!("{} of {}, {} files{times}", self.guests, mib(d.mem), d.files)),
            ("passes, pages scanned", format!("{}, {}", d.passes, self.pages_scanned)),
            ("pages merged", self.pages_merged.to_string()),
            ("  repointed by change_pte", self.changes.to_string()),
            ("  zapped", self.zaps.to_string()),
            ("pages un-merged by writes", self.unmerged.to_string()),
            ("pages merged now, in frames", format!("{}, {}", d.merged_now, d.frames)),
            ("bytes saved", mib(self.bytes_saved)),
            ("bytes returned to the host", mib(self.bytes_returned)),
            ("not merged: absent, changed", format!("{}, {}", d.absent, d.differed)),
            ("windows, vetoed", format!("{}, {}", d.windows, self.vetoes)),
            ("faults, retried, unrelated", format!("{}, {}, {}", d.faults, self.retries, self.unrelated_retries)),
            ("read faults on merged pages", self.refaults_after_merge.to_string()),
            ("page checks, writes, leases", format!("{}, {}, {}", d.checks, d.writes, d.leases)),
            ("lost writes", self.lost_writes.to_string()),
            ("stale reads", self.stale_reads.to_string()),
            (
                "time, CPU, of it merger",
                format!("{}, {}, {}", ms(self.elapsed_ms), ms(self.cpu_ms), ms(self.merger_cpu_ms)),
            ),
        ];
        if let Some(format) = d.format {
            rows.insert(1, ("tables", format.word().into()));
        }
        if d.kvm {
            let faults = self.kvm_page_faults.map_or("not counted".into(), |faults| faults.to_string());
            let exits = self.kvm_exits.unwrap_or_default();
            rows.push(("KVM: exits, page faults", format!("{exits}, {faults}")));
            let [failures, mappings, stuck] = [d.host_failures, d.no_mapping, d.stuck];
            rows.push(("host: failures, no mapping, stuck", format!("{failures}, {mappings}, {stuck}")));
        }
        let mut table = Table::new();
        table.load_preset(presets::UTF8_BORDERS_ONLY);
        for (name, value) in rows {
            table.add_row([name.to_string(), value]);
        }
        if let Some(column) = table.column_mut(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        write!(f, "{table}")?;
        if !self.samples.is_empty() {
            let mut table = Table::new();
            table.load_preset(presets::UTF8_BORDERS_ONLY).set_header(["guest", "gpa", "level", "before", "after"]);
            for s in &self.samples {
                table.add_row([&s.guest.to_string(), &s.gpa, &s.level.to_string(), &s.before, &s.after]);
            }
            write!(f, "\n{table}")?;
        }
        if d.interrupted {
            f.write_str("\ninterrupted")?;
        }
        Ok(())
    }
}
