// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Lets MMUs that somebody else wrote walk our page tables, and compares.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use conformance::change::Seen;
use conformance::emulator::Tools;
use conformance::machines::candidates;
use conformance::report::{Failure, Report, Settings};
use indicatif::{ProgressBar, ProgressStyle};

/// Lets MMUs that somebody else wrote walk the page tables of every format, and compares with the model.
///
/// Ends with 1 where something disagrees, 2 where a machine could not be checked to the end, and 0 otherwise; a machine whose
/// emulator is not installed is named and passed over.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// Machines, by name or by the beginning of it; all by default.
    #[arg(long, value_name = "M", num_args = 1..)]
    machine: Vec<String>,
    /// What everything random is made of.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Random sequences of each machine [default: as many as make --accesses].
    #[arg(long, value_name = "N")]
    cases: Option<u64>,
    /// Accesses of each machine, through random tables and single entries.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    accesses: u64,
    /// Leaves of each level of which every bit is turned, at most.
    #[arg(long, value_name = "N", default_value_t = 24)]
    leaves: usize,
    /// Operations while a guest writes.
    #[arg(long, value_name = "N", default_value_t = 400)]
    rounds: u64,
    /// One JSON object a line and machine.
    #[arg(long)]
    json: bool,
    /// A machine that could be had if something were installed is an error.
    #[arg(long)]
    require: bool,
    /// A folder in which packages with emulators were unpacked, looked at before PATH.
    #[arg(long, value_name = "DIR", env = "CONFORMANCE_TOOLS")]
    tools: Option<PathBuf>,
    /// Names the machines, and does nothing.
    #[arg(long)]
    list: bool,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        // Whoever reads has gone.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(2),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn run(cli: &Cli) -> io::Result<ExitCode> {
    let mut out = io::stdout();
    let mut candidates = candidates();
    let names: Vec<String> = candidates.iter().map(|candidate| candidate.name.clone()).collect();
    // A whole name means that machine alone, though others begin like it.
    let means = |asked: &String, name: &str| {
        if names.contains(asked) { asked == name } else { name.starts_with(asked.as_str()) }
    };
    let asked = |name: &str| cli.machine.is_empty() || cli.machine.iter().any(|asked| means(asked, name));
    candidates.retain(|candidate| asked(&candidate.name));
    let unknown = |asked: &&String| !names.iter().any(|name| means(asked, name));
    if let Some(unknown) = cli.machine.iter().find(unknown) {
        eprintln!("error: no machine is called {unknown}; --list names them");
        return Ok(ExitCode::from(2));
    }
    if cli.list {
        for candidate in candidates {
            writeln!(out, "{}", candidate.name)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let tools = Tools::new(cli.tools.clone());
    let Cli { seed, cases, accesses, leaves, rounds, .. } = *cli;
    let settings = Settings { seed, cases, accesses, leaves, rounds };
    let progress = if io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}") {
        progress.set_style(style);
    }
    let (mut reports, mut code) = (Vec::new(), 0);
    for candidate in candidates {
        match candidate.run(&tools, &settings, &progress) {
            Ok(report) => {
                progress.suspend(|| show(&mut out, &report, cli.json))?;
                code = code.max(u8::from(report.divergences != 0));
                reports.push(report);
            }
            Err(Failure::Lost(lost)) if lost.passes_over(cli.require) => {
                progress.suspend(|| eprintln!("{}: {lost}", candidate.name));
            }
            Err(failure) => {
                progress.suspend(|| eprintln!("{}: error: {failure}", candidate.name));
                code = 2;
            }
        }
    }
    progress.finish_and_clear();
    if !cli.json && !reports.is_empty() {
        table(&mut out, &reports)?;
    }
    Ok(ExitCode::from(code))
}

fn show(out: &mut impl Write, report: &Report, json: bool) -> io::Result<()> {
    if json {
        writeln!(out, "{}", serde_json::to_string(report)?)?;
    } else {
        let Report { machine, cases, accesses, faults_checked, divergences, .. } = report;
        writeln!(
            out,
            "{machine}: cases={cases} accesses={accesses} faults_checked={faults_checked} divergences={divergences}"
        )?;
    }
    for shown in &report.shown {
        eprintln!("{}: {shown}", report.machine);
    }
    out.flush()
}

/// What a guest sees of pages that move, on every machine.
fn table(out: &mut impl Write, reports: &[Report]) -> io::Result<()> {
    writeln!(
        out,
        "\n| machine | pages | change_pte: read faults | kicks | breaks | faults of a later store | zap: read faults |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|")?;
    for Report { machine, change, zap, .. } in reports {
        let Seen { pages, read_faults, kicks, breaks, write_faults, stores, .. } = change;
        let zapped = zap.read_faults;
        writeln!(
            out,
            "| {machine} | {pages} | {read_faults} | {kicks} | {breaks} | {write_faults} of {stores} | {zapped} |"
        )?;
    }
    Ok(())
}
