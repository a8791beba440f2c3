// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `ksmd`, the kernel thread that merges: the processor time it has used, and what KSM counts.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use super::Paths;

/// A file of the kernel that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The file cannot be read.
    #[error("reading {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The file does not hold what it should.
    #[error("{} has no {what}: {text:?}", path.display())]
    Text {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
        /// What it holds, its beginning.
        text: String,
    },
    /// No kernel thread is called `ksmd`: a kernel without KSM, or a PID namespace that does not show it.
    #[error("no kernel thread ksmd among the processes in {}", proc.display())]
    NoDaemon {
        /// The directory of processes.
        proc: PathBuf,
    },
}

fn text(path: &Path) -> Result<String, DaemonError> {
    fs::read_to_string(path).map_err(|source| DaemonError::Read { path: path.into(), source })
}

fn malformed(path: &Path, what: &'static str, text: &str) -> DaemonError {
    DaemonError::Text { path: path.into(), what, text: text.chars().take(80).collect() }
}

/// The fields of `/proc/PID/stat` from the third on: what precedes them is a name that may hold anything.
fn fields(stat: &str) -> Option<impl Iterator<Item = &str>> {
    stat.rsplit_once(')').map(|(_, rest)| rest.split_ascii_whitespace())
}

/// `ksmd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    pid: u32,
    directory: PathBuf,
}

impl Daemon {
    /// The process called `ksmd` whose parent is `kthreadd`, number 2: any other may call itself so.
    ///
    /// # Errors
    /// [`DaemonError::Read`] where the processes cannot be listed; [`DaemonError::NoDaemon`].
    pub fn find(paths: &Paths) -> Result<Self, DaemonError> {
        let failed = |source| DaemonError::Read { path: paths.proc.clone(), source };
        for entry in fs::read_dir(&paths.proc).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let directory = entry.path();
            // A process that ends meanwhile is not the one.
            let Ok(comm) = fs::read_to_string(directory.join("comm")) else { continue };
            if comm.trim_end_matches('\n') != "ksmd" {
                continue;
            }
            let Ok(stat) = fs::read_to_string(directory.join("stat")) else { continue };
            if fields(&stat).and_then(|mut fields| fields.nth(1)) == Some("2") {
                return Ok(Self { pid, directory });
            }
        }
        Err(DaemonError::NoDaemon { proc: paths.proc.clone() })
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Processor time it has used since the host started.
    ///
    /// From `schedstat`, in nanoseconds; from `stat`, in ticks of the clock (usually 10 ms), on a kernel without
    /// `CONFIG_SCHED_INFO`. The kernel brings the first up to date at each tick and each switch: while `ksmd` runs it
    /// may be some milliseconds behind, while it rests it is exact.
    ///
    /// # Errors
    /// [`DaemonError::Read`] and [`DaemonError::Text`] where neither file serves.
    pub fn cpu(&self) -> Result<Duration, DaemonError> {
        let path = self.directory.join("schedstat");
        match text(&path) {
            Ok(text) => {
                let first = text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
                first.map(Duration::from_nanos).ok_or_else(|| malformed(&path, "nanoseconds run", &text))
            }
            Err(DaemonError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => self.cpu_in_ticks(),
            Err(error) => Err(error),
        }
    }

    fn cpu_in_ticks(&self) -> Result<Duration, DaemonError> {
        let path = self.directory.join("stat");
        let stat = text(&path)?;
        let ticks = || {
            // utime and stime are the 14th and 15th of proc_pid_stat(5); the iterator begins with the 3rd.
            let mut fields = fields(&stat)?.skip(11);
            let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            user.checked_add(system)
        };
        let ticks = ticks().ok_or_else(|| malformed(&path, "utime and stime", &stat))?;
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        let nanos = (ticks % per_second).saturating_mul(1_000_000_000) / per_second;
        Ok(Duration::from_secs(ticks / per_second) + Duration::from_nanos(nanos))
    }
}

fn parse<T: FromStr>(path: &Path) -> Result<T, DaemonError> {
    let text = text(path)?;
    text.trim().parse().map_err(|_| malformed(path, "number", &text))
}

/// A number that an older kernel may not have.
fn parse_if_there<T: FromStr>(path: &Path) -> Result<Option<T>, DaemonError> {
    match parse(path) {
        Ok(number) => Ok(Some(number)),
        Err(DaemonError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What KSM counts for the whole host. All in pages but `general_profit`. They are read one after the other: while
/// `ksmd` works they need not fit each other. Memory that is gone, also of a process that has ended, is among them
/// until `ksmd` scans again: with `run` at 0, for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Counters {
    /// Frames that are shared.
    pub pages_shared: u64,
    /// Mappings that lead to them, beyond the first of each: how many pages are saved.
    pub pages_sharing: u64,
    /// Pages that are checked again and again and have no equal.
    pub pages_unshared: u64,
    /// Times that all of the marked memory was scanned.
    pub full_scans: u64,
    /// Pages looked at. Linux 6.6.
    pub pages_scanned: Option<u64>,
    /// Pages that `smart_scan` spared. Linux 6.7.
    pub pages_skipped: Option<u64>,
    /// Pages mapped to the zero page by KSM. Linux 6.6.
    pub zero_pages: Option<u64>,
    /// Bytes saved, less those that KSM's own records take. Linux 6.4.
    pub general_profit: Option<i64>,
}

impl Counters {
    /// As they are now.
    ///
    /// # Errors
    /// [`DaemonError::Read`] and [`DaemonError::Text`] name the file.
    pub fn read(paths: &Paths) -> Result<Self, DaemonError> {
        let file = |name| paths.sysfs.join(name);
        Ok(Self {
            pages_shared: parse(&file("pages_shared"))?,
            pages_sharing: parse(&file("pages_sharing"))?,
            pages_unshared: parse(&file("pages_unshared"))?,
            full_scans: parse(&file("full_scans"))?,
            pages_scanned: parse_if_there(&file("pages_scanned"))?,
            pages_skipped: parse_if_there(&file("pages_skipped"))?,
            zero_pages: parse_if_there(&file("ksm_zero_pages"))?,
            general_profit: parse_if_there(&file("general_profit"))?,
        })
    }
}

/// What KSM counts for this process: `/proc/self/ksm_stat`, Linux 6.1.
///
/// These are counts of KSM's records. Pages that were unmapped, unmarked or written since are among them until
/// `ksmd`'s next scans drop their records (`remove_rmap_item_from_tree` in `mm/ksm.c`), so where memory comes and goes,
/// differences of `rmap_items` and `merging_pages` mean little. [`Sums::ksm`](super::Sums::ksm) tells what is merged
/// now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct ProcessStat {
    /// Pages that KSM keeps a record of.
    pub rmap_items: u64,
    /// Pages that lead to a shared frame, the first of each frame included.
    pub merging_pages: u64,
    /// Pages mapped to the zero page by KSM. Linux 6.6.
    pub zero_pages: u64,
    /// Bytes: `merging_pages` and `zero_pages`, less the records. More than is saved, by one page for each shared
    /// frame.
    pub process_profit: i64,
}

impl ProcessStat {
    /// Bytes of the host's memory that the records take: what the kernel took off the profit. `page` is the bytes of a
    /// page.
    pub fn records(&self, page: u64) -> u64 {
        let gross = i128::from(self.merging_pages.saturating_add(self.zero_pages)) * i128::from(page);
        u64::try_from(gross - i128::from(self.process_profit)).unwrap_or(0)
    }

    /// As it is now.
    ///
    /// # Errors
    /// [`DaemonError::Read`]; [`DaemonError::Text`] names the line that is missing.
    pub fn read(paths: &Paths) -> Result<Self, DaemonError> {
        let path = paths.proc.join("self/ksm_stat");
        Self::parse(&text(&path)?, &path)
    }

    /// The same, from text that was read from `path`.
    ///
    /// # Errors
    /// [`DaemonError::Text`] names the line that is missing or is no number.
    pub fn parse(text: &str, path: &Path) -> Result<Self, DaemonError> {
        fn line<T: FromStr>(text: &str, path: &Path, name: &'static str) -> Result<Option<T>, DaemonError> {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.map(|value| value.trim().parse().map_err(|_| malformed(path, name, value))).transpose()
        }
        let needed = |name| line(text, path, name)?.ok_or_else(|| malformed(path, name, text));
        Ok(Self {
            rmap_items: needed("ksm_rmap_items")?,
            merging_pages: needed("ksm_merging_pages")?,
            zero_pages: line(text, path, "ksm_zero_pages")?.unwrap_or(0),
            process_profit: line(text, path, "ksm_process_profit")?
                .ok_or_else(|| malformed(path, "ksm_process_profit", text))?,
        })
    }
}
