// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command line: what may be asked for, and what is wrong with what was asked.

use std::{ffi::OsString, fs, path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum, error::ErrorKind};

use super::{memory::PAGE, table::TableFormat};

/// Guests more than this would be threads waiting for each other.
const MOST_GUESTS: u32 = 32;
/// The smallest RAM, in bytes.
const LEAST_MEM: u64 = 1 << 20;
/// Without `--seconds`, guests run no longer than this, so that a run with filling and checking stays within 30 seconds.
const LONGEST: Duration = Duration::from_secs(25);

/// What walks the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[non_exhaustive]
pub enum Backend {
    /// KVM where guests can run on it, else software.
    Auto,
    /// Threads that walk the table as hardware would.
    Software,
    /// Guests on KVM, natively.
    Kvm,
}

/// How translations follow a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MergeMode {
    /// Repointed, through change_pte: nobody faults.
    Change,
    /// Removed, as Linux does: whoever uses the page next faults.
    Zap,
}

/// How careful the merger is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Safety {
    /// Compares and gives memory back inside a window.
    Safe,
    /// Compares before the window is opened.
    NoFence,
    /// Gives memory back with no window at all.
    NoNotify,
}

/// Merges identical pages of running guests and repoints their translations through change_pte.
///
/// Guests' RAM holds real files. They read, write and check it while a merger finds equal pages, keeps one copy, and
/// gives the rest back to the host. Their vCPUs run on KVM, with devices that walk a table of ours; or all of them are
/// threads that walk one.
#[derive(Debug, Clone, Parser)]
#[command(
    name = "dedup",
    version,
    after_help = "Exit codes: 0 the run was as it should be; 1 it was not: a safe run lost a write or saw a stale \
                  read, an unsafe run did no harm (then the check is blind), or something failed; 2 bad input."
)]
#[non_exhaustive]
pub struct Options {
    /// Run for N seconds (otherwise: until nothing more is to be merged, at most 25 seconds)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: Option<u64>,

    /// How many guests
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=i64::from(MOST_GUESTS)))]
    pub guests: u32,

    /// RAM of each guest: bytes, or a number with K, M or G; a multiple of 4K
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = size)]
    pub mem: u64,

    /// Decides which files, where they lie, and what guests do
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// What guests run on; auto is kvm where /dev/kvm opens, and says why if it is not
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,

    /// Format of the tables that software walks (otherwise: ept); auto is software then
    #[arg(long, value_enum)]
    pub format: Option<TableFormat>,

    /// How translations follow a merge
    #[arg(long, value_enum, default_value_t = MergeMode::Change)]
    pub mode: MergeMode,

    /// Fill RAM with these files (otherwise: shared libraries found on this machine)
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub image: Vec<PathBuf>,

    /// Draw memory saved and faults over time
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,

    /// Print one JSON object as the last line
    #[arg(long)]
    pub json: bool,

    /// Do harm: compare pages before the window is opened
    #[arg(long, conflicts_with = "unsafe_no_notify")]
    pub unsafe_no_fence: bool,

    /// Do harm: give memory back with no window at all
    #[arg(long)]
    pub unsafe_no_notify: bool,
}

/// A command line that does not say what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// Help or version was asked for: not an error.
    #[error("{0}")]
    Help(String),
    /// An argument is wrong.
    #[error("{0}")]
    Argument(String),
    /// More memory than there is.
    #[error("{guests} guests of {mem} MiB need about {needed} MiB, and {available} MiB are available")]
    Memory {
        /// Number of guests.
        guests: u32,
        /// RAM of each, in MiB.
        mem: u64,
        /// What a run takes, in MiB.
        needed: u64,
        /// What there is, in MiB.
        available: u64,
    },
    /// The plot is to be an SVG file.
    #[error("the plot {} is to end in .svg", path.display())]
    PlotName {
        /// What was asked for.
        path: PathBuf,
    },
}

impl UsageError {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Self::Help(_)) { 0 } else { 2 }
    }
}

impl Options {
    /// Reads a command line, program name first.
    ///
    /// # Errors
    /// [`UsageError`]: one line to print, but for [`UsageError::Help`].
    pub fn from_args<I, T>(args: I) -> Result<Self, UsageError>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let options = Self::try_parse_from(args).map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => UsageError::Help(error.to_string()),
            _ => UsageError::Argument(one_line(&error.to_string())),
        })?;
        options.check()?;
        Ok(options)
    }

    fn check(&self) -> Result<(), UsageError> {
        if let Some(path) = self.plot.as_ref().filter(|path| path.extension().is_none_or(|ext| ext != "svg")) {
            return Err(UsageError::PlotName { path: path.clone() });
        }
        // Each guest's homes, or the store's frames in their stead; the images; and what is always there.
        let needed = u64::from(self.guests).saturating_add(1).saturating_mul(self.mem).saturating_add(64 << 20);
        match available_memory() {
            Some(available) if needed > available => Err(UsageError::Memory {
                guests: self.guests,
                mem: self.mem >> 20,
                needed: needed >> 20,
                available: available >> 20,
            }),
            _ => Ok(()),
        }
    }

    /// How careful the merger is to be.
    pub fn safety(&self) -> Safety {
        match (self.unsafe_no_fence, self.unsafe_no_notify) {
            (true, _) => Safety::NoFence,
            (_, true) => Safety::NoNotify,
            _ => Safety::Safe,
        }
    }

    /// How long the run may take at most, and whether it ends sooner when nothing more is to be merged.
    pub fn limit(&self) -> (Duration, bool) {
        self.seconds.map_or((LONGEST, true), |seconds| (Duration::from_secs(seconds), false))
    }

    /// Pages of each guest.
    pub fn pages(&self) -> usize {
        (self.mem / PAGE as u64) as usize
    }
}

/// clap's message as one line: what is wrong and what is possible, without the usage that follows.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim);
    let lines: Vec<_> = lines.take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more")).collect();
    let line = lines.join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Bytes of memory that could be had, where the host says so.
fn available_memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// A size that a guest's RAM can have.
fn size(text: &str) -> Result<u64, SizeError> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return Err(SizeError::NotASize),
    };
    let number: u64 = number.parse().map_err(|_| SizeError::NotASize)?;
    let bytes = number.checked_mul(1 << shift).ok_or(SizeError::TooLarge)?;
    match bytes {
        _ if bytes < LEAST_MEM => Err(SizeError::TooSmall),
        _ if bytes >= super::memory::STORE_BASE => Err(SizeError::TooLarge),
        _ if bytes % PAGE as u64 != 0 => Err(SizeError::Unaligned),
        _ => Ok(bytes),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum SizeError {
    #[error("a size is a number of bytes, or a number with K, M or G")]
    NotASize,
    #[error("a guest has at least 1M")]
    TooSmall,
    #[error("a guest has less than 1024G")]
    TooLarge,
    #[error("a size is a multiple of 4K")]
    Unaligned,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, UsageError> {
        Options::from_args([&["dedup"], args].concat())
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(size("1048576"), Ok(1 << 20));
        assert_eq!(size("4m"), Ok(4 << 20));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        assert_eq!(size("1K"), Err(SizeError::TooSmall));
        assert_eq!(size("1048577"), Err(SizeError::Unaligned));
        assert_eq!(size("9999999999G"), Err(SizeError::TooLarge));
        for bad in ["", "M", "-1", "1.5G", "12X", "1MM"] {
            assert_eq!(size(bad), Err(SizeError::NotASize), "{bad}");
        }
    }

    #[test]
    fn what_is_not_said_has_a_default() {
        let options = parse(&[]).unwrap();
        assert_eq!((options.guests, options.mem, options.seed), (2, 128 << 20, 1));
        assert_eq!((options.mode, options.safety()), (MergeMode::Change, Safety::Safe));
        assert_eq!(options.limit(), (LONGEST, true));
        assert_eq!(parse(&["--seconds", "3"]).unwrap().limit(), (Duration::from_secs(3), false));
    }

    #[test]
    fn bad_input_is_one_line_and_exit_code_2() {
        let bad: &[&[&str]] = &[
            &["--guests", "0"],
            &["--guests", "33"],
            &["--seconds", "0"],
            &["--seconds", "soon"],
            &["--mem", "12Q"],
            &["--mem", "1000G", "--guests", "32"],
            &["--mode", "swap"],
            &["--backend", "xen"],
            &["--plot", "plot.png"],
            &["--unsafe-no-fence", "--unsafe-no-notify"],
            &["--image"],
            &["--frobnicate"],
            &["leftover"],
        ];
        for args in bad {
            let error = parse(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
            let line = error.to_string();
            assert!(!line.is_empty() && !line.contains('\n') && !line.contains("Usage"), "{args:?}: {line}");
        }
    }

    #[test]
    fn help_is_not_an_error() {
        let help = parse(&["--help"]).unwrap_err();
        assert_eq!(help.exit_code(), 0);
        assert!(help.to_string().contains("--unsafe-no-fence"));
    }
}
