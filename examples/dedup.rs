// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Identical pages of running guests, merged and repointed through `change_pte`. See `README.md` beside this file, and
//! `--help`.
#![forbid(unsafe_code)]

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use examples::{
    dedup::{Options, Report, UsageError, run},
    ksm::{Paths, SettingsError, restore_left_over},
};

fn main() -> ExitCode {
    let options = match Options::from_args(env::args_os()) {
        Ok(options) => options,
        Err(UsageError::Help(text)) => {
            let _ = write!(io::stdout(), "{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("dedup: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    // A run of `side_by_side` that was killed leaves settings of the host changed. Whoever comes next puts them back.
    match restore_left_over(&Paths::system()) {
        Ok(None) | Err(SettingsError::Busy { .. }) => {}
        // Settings that this user could not have changed, nor put back.
        Err(SettingsError::Record { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {}
        Ok(Some(restored)) => eprintln!("dedup: {restored}"),
        Err(error) => eprintln!("dedup: {error}"),
    }
    let interrupt = Arc::new(AtomicBool::new(false));
    let handler = {
        let interrupt = Arc::clone(&interrupt);
        // The first ends the run, with its report. Who does not want to wait for that, asks again.
        move || {
            if interrupt.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        }
    };
    if let Err(error) = ctrlc::set_handler(handler) {
        eprintln!("dedup: Ctrl-C will end without a report: {error}");
    }
    let report = match run(&options, &interrupt) {
        Ok(report) => report,
        Err(error) => {
            eprintln!("dedup: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    // Whoever closed the pipe has read enough.
    if let Err(error) = print(&report, options.json)
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        eprintln!("dedup: cannot write the report: {error}");
        return ExitCode::FAILURE;
    }
    if report.exit_code() != 0 {
        eprintln!("dedup: {}", report.complaint());
    }
    ExitCode::from(report.exit_code())
}

fn print(report: &Report, json: bool) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{report}")?;
    if json {
        writeln!(out, "{}", report.json()?)?;
    }
    out.flush()
}
