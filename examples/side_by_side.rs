// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Identical pages merged by the kernel (KSM) and by this workspace's merger, in turn, on the same images and guests. See
//! `README.md` beside this file, and `--help`.
#![forbid(unsafe_code)]

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use examples::{
    dedup::{Error, Options, Quiet, Ram, UsageError, merge_quietly, merge_with_ksm},
    ksm::{self, Paths, Plan},
};

/// Merges identical pages of guests on KVM that stand still: by the kernel's KSM, and by this workspace's merger, in turn.
///
/// KSM's settings are changed for its turns, and put back; also after Ctrl-C, and by the next run after a kill.
#[derive(Debug, Parser)]
#[command(name = "side_by_side", version)]
struct Arguments {
    /// Turns of each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=99))]
    runs: u32,

    /// How many guests
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=32))]
    guests: u32,

    /// RAM of each guest
    #[arg(long, value_name = "SIZE", default_value = "128M")]
    mem: String,

    /// Decides which files, and where they lie
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Fill RAM with these files (otherwise: shared libraries found on this machine)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    image: Vec<PathBuf>,

    /// Let KSM rest between scans: 20 ms after every 2000 pages
    #[arg(long)]
    kind: bool,

    /// Print every turn as a JSON object, last
    #[arg(long)]
    json: bool,
}

/// One line of the result.
struct Side {
    name: &'static str,
    turns: Vec<Quiet>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => {
            eprintln!("side_by_side: {error}");
            ExitCode::from(error.exit_code())
        }
        Err(Failure::Interrupted | Failure::Run(Error::Interrupted)) => {
            eprintln!("side_by_side: interrupted; KSM's settings are as they were");
            ExitCode::FAILURE
        }
        Err(Failure::Run(error)) => {
            eprintln!("side_by_side: {error}");
            ExitCode::from(error.exit_code())
        }
        Err(Failure::Settings(error)) => {
            eprintln!("side_by_side: {error}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Usage(#[from] UsageError),
    #[error(transparent)]
    Run(#[from] Error),
    #[error(transparent)]
    Settings(#[from] ksm::SettingsError),
    #[error("interrupted")]
    Interrupted,
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    if let Some(restored) = ksm::restore_left_over(&Paths::system())? {
        eprintln!("side_by_side: {restored}");
    }
    let mut line = vec!["side_by_side".into(), "--guests".into(), arguments.guests.to_string().into()];
    line.extend(["--mem".into(), arguments.mem.clone().into(), "--seed".into(), arguments.seed.to_string().into()]);
    if !arguments.image.is_empty() {
        line.push("--image".into());
        line.extend(arguments.image.iter().map(|path| path.clone().into_os_string()));
    }
    let options = Options::from_args(line)?;
    let interrupt = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&interrupt);
    if let Err(error) = ctrlc::set_handler(move || handler.store(true, Ordering::Relaxed)) {
        eprintln!("side_by_side: Ctrl-C leaves the settings to the next run: {error}");
    }
    let plan = if arguments.kind { Plan::kind() } else { Plan::eager() };

    let mut sides = [("KSM, private RAM", vec![]), ("ours, private RAM", vec![]), ("ours, shared memfd", vec![])]
        .map(|(name, turns)| Side { name, turns });
    for turn in 1..=arguments.runs {
        for (index, side) in sides.iter_mut().enumerate() {
            if interrupt.load(Ordering::Relaxed) {
                return Err(Failure::Interrupted);
            }
            eprintln!("turn {turn} of {}: {}", arguments.runs, side.name);
            side.turns.push(match index {
                0 => merge_with_ksm(&options, &plan, &interrupt)?,
                1 => merge_quietly(&options, Ram::Anonymous, &interrupt)?,
                _ => merge_quietly(&options, Ram::SharedFile, &interrupt)?,
            });
        }
    }
    if interrupt.load(Ordering::Relaxed) {
        return Err(Failure::Interrupted);
    }
    println!("{}", table(&sides));
    if arguments.json {
        for side in &sides {
            let turns = serde_json::json!({ "side": side.name, "turns": side.turns });
            println!("{turns}");
        }
    }
    Ok(())
}

fn table(sides: &[Side]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_BORDERS_ONLY);
    let mut header = vec![format!("medians of {}", sides[0].turns.len())];
    header.extend(sides.iter().map(|side| side.name.to_string()));
    table.set_header(header);
    let pages = |get: fn(&Quiet) -> u64| {
        move |side: &Side| median(&side.turns, |turn| Some(get(turn) as f64)).map(|n| format!("{n:.0}"))
    };
    let mib = |get: fn(&Quiet) -> u64| {
        move |side: &Side| {
            median(&side.turns, |turn| Some(get(turn) as f64)).map(|n| format!("{:.1} MiB", n / 1_048_576.0))
        }
    };
    let ms = |get: fn(&Quiet) -> Option<Duration>| {
        move |side: &Side| {
            median(&side.turns, |turn| get(turn).map(|time| time.as_secs_f64())).map(|n| format!("{:.0} ms", n * 1e3))
        }
    };
    let us = |get: fn(&Quiet) -> Option<Duration>| {
        move |side: &Side| {
            median(&side.turns, |turn| get(turn).map(|time| time.as_secs_f64())).map(|n| format!("{:.2} us", n * 1e6))
        }
    };
    type Cell<'c> = Box<dyn Fn(&Side) -> Option<String> + 'c>;
    let rows: [(&str, Cell<'_>); 10] = [
        ("pages that could go", Box::new(pages(|turn| turn.spare))),
        ("pages merged", Box::new(pages(|turn| turn.merged))),
        ("pages saved", Box::new(pages(|turn| turn.saved))),
        ("memory given back", Box::new(mib(|turn| turn.bytes_returned))),
        ("merger's CPU", Box::new(ms(|turn| Some(turn.cpu)))),
        ("  for a page merged", Box::new(us(Quiet::cpu_per_page))),
        ("  until 95 % were saved", Box::new(ms(|turn| turn.at_95.map(|(cpu, _)| cpu)))),
        ("time until 95 % were saved", Box::new(ms(|turn| turn.at_95.map(|(_, wall)| wall)))),
        ("time", Box::new(ms(|turn| Some(turn.wall)))),
        ("mappings of RAM", Box::new(pages(|turn| turn.mappings))),
    ];
    for (name, cell) in rows {
        let mut row = vec![name.to_string()];
        row.extend(sides.iter().map(|side| cell(side).unwrap_or_else(|| "-".into())));
        table.add_row(row);
    }
    for column in 1..=sides.len() {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// The median of what turns have; `None` where one has none.
fn median(turns: &[Quiet], of: impl Fn(&Quiet) -> Option<f64>) -> Option<f64> {
    let mut values = turns.iter().map(of).collect::<Option<Vec<f64>>>()?;
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() % 2 {
        _ if values.is_empty() => None,
        1 => values.get(middle).copied(),
        _ => Some((values.get(middle - 1)? + values.get(middle)?) / 2.0),
    }
}
