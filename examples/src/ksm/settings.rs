// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KSM's settings: changed for a run, and put back after it, whatever becomes of the run.
//!
//! [`Saved::take`] writes every setting it finds to a record before the first of them is changed, and [`Saved::set`]
//! notes each change there before making it. Dropping a [`Saved`] puts the changed ones back and removes the record.
//! A run that is killed leaves the record behind; [`restore_left_over`] finds it and does the same. Settings that the
//! run did not change are not touched, so what an administrator changes meanwhile stays.
//!
//! A lock (`flock`, which the kernel releases when its holder dies) on a file beside the record tells a run that is
//! alive from one that was killed. That file stays; the record is replaced as a whole, never written in place.
//!
//! What refuses when (`mm/ksm.c`): `max_page_sharing` and `merge_across_nodes` while any page is shared (`EBUSY`);
//! `pages_to_scan` while an advisor chooses it (`EINVAL`), and choosing an advisor or none resets it. So `run` is put
//! back first where that stops `ksmd`, the advisor before `pages_to_scan`, and `run` again last.

use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process,
};

use serde::{Deserialize, Serialize};

use super::Paths;

/// Settings that cannot be read, changed or put back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// This kernel has no KSM: nothing was changed.
    #[error("no KSM here: {} does not exist", path.display())]
    NoKsm {
        /// The file looked for.
        path: PathBuf,
    },
    /// This kernel's KSM has no such setting: nothing was changed.
    #[error("this kernel's KSM has no setting {setting}")]
    NoSetting {
        /// The setting asked for.
        setting: Setting,
    },
    /// A setting cannot be read: nothing was changed.
    #[error("reading {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The record cannot be written, read, locked or removed. Where it could not be written, nothing was changed.
    #[error("the record of KSM settings {}: {source}", path.display())]
    Record {
        /// The file or directory that failed.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// The record is not one of ours. It is left alone: look at it, put the settings back by hand and remove it.
    #[error("{} is no record of KSM settings: {source}", path.display())]
    NotARecord {
        /// The record.
        path: PathBuf,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
    /// Another run is using KSM's settings.
    #[error("KSM's settings are in use by another run{}",
        pid.map(|pid| format!(", process {pid}")).unwrap_or_default())]
    Busy {
        /// Its process, unless it has not written that yet.
        pid: Option<u32>,
    },
    /// A run that was killed left its changes: [`restore_left_over`] puts them back.
    #[error("process {pid} was killed while it had KSM's settings changed; put them back first, from {}",
        path.display())]
    LeftOver {
        /// The process that is gone.
        pid: u32,
        /// Its record.
        path: PathBuf,
    },
    /// The kernel did not take a new value.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Some settings are not as they were found; the others are. The record is kept, so that it can be tried again.
    #[error("KSM settings not put back ({} kept): {}", record.display(), List(failed))]
    Partly {
        /// Those that are as they were found again.
        put_back: Vec<PutBack>,
        /// Those that are not.
        failed: Vec<Refused>,
        /// The record.
        record: PathBuf,
    },
}

/// A value that a setting did not take.
#[derive(Debug, thiserror::Error)]
#[error("{setting} stays at {is}, does not become {wanted}: {source}")]
pub struct Refused {
    /// The setting.
    pub setting: Setting,
    /// What it was to be.
    pub wanted: String,
    /// What it is; `?` where that cannot be read.
    pub is: String,
    /// The host's error; [`io::ErrorKind::InvalidData`] where the kernel took the value and then had another.
    pub source: io::Error,
}

struct List<'a, T>(&'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, item) in self.0.iter().enumerate() {
            write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

macro_rules! settings {
    ($($(#[$doc:meta])* $name:ident = $file:literal),+ $(,)?) => {
        /// A setting of KSM that can be changed: a file below `/sys/kernel/mm/ksm`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        pub enum Setting {
            $($(#[$doc])* #[serde(rename = $file)] $name,)+
        }

        impl Setting {
            /// All of them. A kernel need not have each.
            pub const ALL: &[Self] = &[$(Self::$name),+];

            /// The file's name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $file,)+
                }
            }
        }
    };
}

settings! {
    /// 0: `ksmd` rests, and what is merged stays so; 1: it works; 2: it rests, and everything is un-merged.
    Run = "run",
    /// Who chooses `pages_to_scan`: `none` or `scan-time`. Linux 6.8.
    AdvisorMode = "advisor_mode",
    /// Pages that `ksmd` looks at between two rests.
    PagesToScan = "pages_to_scan",
    /// Milliseconds of a rest.
    SleepMillisecs = "sleep_millisecs",
    /// 1: pages that did not merge are looked at less and less often. Linux 6.7.
    SmartScan = "smart_scan",
    /// 1: pages of zeroes are mapped to the kernel's zero page.
    UseZeroPages = "use_zero_pages",
    /// How many mappings may share one frame.
    MaxPageSharing = "max_page_sharing",
    /// 1: pages are merged across NUMA nodes.
    MergeAcrossNodes = "merge_across_nodes",
    /// Milliseconds between two prunings of chains of stale frames.
    StableNodeChainsPruneMillisecs = "stable_node_chains_prune_millisecs",
}

impl Setting {
    /// Whether it can only be changed while no page is shared.
    fn wants_nothing_shared(self) -> bool {
        matches!(self, Self::MaxPageSharing | Self::MergeAcrossNodes)
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A setting that was put back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutBack {
    /// The setting.
    pub setting: Setting,
    /// What it was when putting back began.
    pub from: String,
    /// What it is now, as it was found before the run.
    pub to: String,
}

impl fmt::Display for PutBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} -> {}", self.setting, self.from, self.to)
    }
}

/// What [`restore_left_over`] did. `Display` says it in one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// The process that was killed.
    pub pid: u32,
    /// Settings that were put back; none where all were as they had been.
    pub put_back: Vec<PutBack>,
}

impl fmt::Display for Restored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.put_back.is_empty() {
            return f.write_str("KSM settings that a run killed earlier had recorded are as it found them");
        }
        write!(f, "KSM settings that a run killed earlier had changed were put back: {}", List(&self.put_back))
    }
}

/// What the record holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// The process that wrote it.
    pid: u32,
    /// Frames that KSM shared when it was written.
    pages_shared: u64,
    /// Every setting this kernel has, as it was found.
    found: Vec<(Setting, String)>,
    /// Those that were changed, or were about to be.
    changed: Vec<Setting>,
}

impl Record {
    fn found(&self, setting: Setting) -> Option<&str> {
        self.found.iter().find(|(s, _)| *s == setting).map(|(_, value)| value.as_str())
    }

    fn load(path: &Path) -> Result<Option<Self>, SettingsError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(SettingsError::Record { path: path.into(), source }),
        };
        let record = serde_json::from_slice(&text);
        record.map(Some).map_err(|source| SettingsError::NotARecord { path: path.into(), source })
    }

    /// Replaces the file as a whole, and returns once it is safe from a crash.
    fn store(&self, path: &Path) -> Result<(), SettingsError> {
        let new = path.with_extension("new");
        let write = || -> io::Result<()> {
            // What is left of a write that was killed is nobody's: the lock is ours.
            match fs::remove_file(&new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            fs::rename(&new, path)?;
            File::open(directory(path))?.sync_all()
        };
        write().map_err(|source| SettingsError::Record { path: path.into(), source })
    }
}

fn directory(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The lock that a run holds as long as it lives.
fn lock(record: &Path) -> Result<File, SettingsError> {
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |source| SettingsError::Record { path, source }
    };
    let directory = directory(record);
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed(directory))?;
    let path = record.with_extension("lock");
    let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = open.map_err(failed(&path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut text = String::new();
            let pid = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
            return Err(SettingsError::Busy { pid });
        }
        Err(TryLockError::Error(source)) => return Err(failed(&path)(source)),
    }
    let name = |file: &mut File| {
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", process::id())
    };
    name(&mut file).map_err(failed(&path))?;
    Ok(file)
}

/// A setting's value. Of a list of words that marks the chosen one, `[none] scan-time`, it is that word.
fn read(sysfs: &Path, setting: Setting) -> io::Result<String> {
    let text = fs::read_to_string(sysfs.join(setting.name()))?;
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(word, _)| word);
    Ok(chosen.unwrap_or(text.trim()).to_owned())
}

/// Writes a setting and looks whether it has the value now.
fn write(sysfs: &Path, setting: Setting, wanted: &str) -> Result<(), Refused> {
    let file = || OpenOptions::new().write(true).truncate(true).open(sysfs.join(setting.name()));
    let written = file().and_then(|mut file| file.write_all(wanted.as_bytes()));
    let is = read(sysfs, setting);
    let source = match (written, &is) {
        (Ok(()), Ok(is)) if is == wanted => return Ok(()),
        (Ok(()), Ok(_)) => io::Error::new(io::ErrorKind::InvalidData, "the kernel took it and has another value"),
        (Err(source), _) => source,
        (Ok(()), Err(source)) => io::Error::new(source.kind(), source.to_string()),
    };
    Err(Refused { setting, wanted: wanted.into(), is: is.unwrap_or_else(|_| "?".into()), source })
}

/// Puts back what `record` says was changed.
fn put_back(sysfs: &Path, record: &Record) -> (Vec<PutBack>, Vec<Refused>) {
    let before: Vec<(Setting, String)> =
        record.changed.iter().map(|&s| (s, read(sysfs, s).unwrap_or_else(|_| "?".into()))).collect();
    let changed = |setting| record.changed.contains(&setting);
    let mut failed = Vec::new();
    let mut try_write = |setting, wanted: &str| {
        if read(sysfs, setting).is_ok_and(|is| is == wanted) {
            return;
        }
        if let Err(refused) = write(sysfs, setting, wanted) {
            failed.push(refused);
        }
    };

    // `run` as it is to be in the end: as found where this run changed it, else as somebody else has it now.
    let run_found = record.found(Setting::Run).filter(|_| changed(Setting::Run)).map(str::to_owned);
    let run = run_found.or_else(|| read(sysfs, Setting::Run).ok());
    // Where `ksmd` is to rest in the end, let it rest first: a page merged now would only refuse what follows.
    if let Some(run) = run.as_deref().filter(|run| *run != "1") {
        // A refusal here is met again, and told, at the end.
        let _ = write(sysfs, Setting::Run, run);
    }
    // In the order of `Setting::ALL`: the advisor before what it advises.
    for (setting, found) in &record.found {
        if !changed(*setting) || *setting == Setting::Run {
            continue;
        }
        // An advisor that is at work chooses this itself, and the kernel lets nobody else.
        if *setting == Setting::PagesToScan && read(sysfs, Setting::AdvisorMode).is_ok_and(|mode| mode != "none") {
            continue;
        }
        // Where nobody had a merged page when the run began, all that are merged now may be un-merged for this.
        let in_the_way = setting.wants_nothing_shared() && record.pages_shared == 0;
        if in_the_way && read(sysfs, *setting).is_ok_and(|is| is != *found) {
            let _ = write(sysfs, Setting::Run, "2");
        }
        try_write(*setting, found);
    }
    if let Some(run) = &run {
        try_write(Setting::Run, run);
    }

    let mut done = Vec::new();
    for (setting, from) in before {
        let Some(to) = record.found(setting) else { continue };
        if from != to && read(sysfs, setting).is_ok_and(|is| is == to) {
            done.push(PutBack { setting, from, to: to.to_owned() });
        }
    }
    (done, failed)
}

/// Puts back and removes the record, or keeps it where something was refused.
fn finish(paths: &Paths, record: &Record) -> Result<Vec<PutBack>, SettingsError> {
    let (put_back, failed) = put_back(&paths.sysfs, record);
    if !failed.is_empty() {
        return Err(SettingsError::Partly { put_back, failed, record: paths.record.clone() });
    }
    fs::remove_file(&paths.record).map_err(|source| SettingsError::Record { path: paths.record.clone(), source })?;
    Ok(put_back)
}

/// KSM's settings as they were found, put back when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it puts the settings back at once"]
pub struct Saved {
    paths: Paths,
    record: Record,
    /// Whether dropping has nothing to do any more.
    settled: bool,
    /// Released when this is dropped, or when the process dies.
    _lock: File,
}

impl Saved {
    /// Records the settings as they are. Changes none of them.
    ///
    /// # Errors
    /// [`SettingsError::NoKsm`]; [`SettingsError::Read`]; [`SettingsError::Busy`] where another run has a [`Saved`];
    /// [`SettingsError::LeftOver`] where one was killed; [`SettingsError::Record`] where the record cannot be written.
    pub fn take(paths: &Paths) -> Result<Self, SettingsError> {
        let mut found = Vec::new();
        for &setting in Setting::ALL {
            match read(&paths.sysfs, setting) {
                Ok(value) => found.push((setting, value)),
                Err(source) if source.kind() == io::ErrorKind::NotFound && setting != Setting::Run => {}
                Err(source) => {
                    let path = paths.sysfs.join(setting.name());
                    return Err(match source.kind() {
                        io::ErrorKind::NotFound => SettingsError::NoKsm { path },
                        _ => SettingsError::Read { path, source },
                    });
                }
            }
        }
        let shared = paths.sysfs.join("pages_shared");
        let number = fs::read_to_string(&shared)
            .and_then(|text| text.trim().parse().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e)));
        let pages_shared = number.map_err(|source| SettingsError::Read { path: shared, source })?;

        let lock = lock(&paths.record)?;
        if let Some(left) = Record::load(&paths.record)? {
            return Err(SettingsError::LeftOver { pid: left.pid, path: paths.record.clone() });
        }
        let record = Record { pid: process::id(), pages_shared, found, changed: Vec::new() };
        record.store(&paths.record)?;
        Ok(Self { paths: paths.clone(), record, settled: false, _lock: lock })
    }

    /// What `setting` was before the run; `None` where this kernel does not have it.
    pub fn found(&self, setting: Setting) -> Option<&str> {
        self.record.found(setting)
    }

    /// Changes a setting, after noting in the record that it does.
    ///
    /// Writing `run` waits until `ksmd` rests between two batches of `pages_to_scan`.
    ///
    /// # Errors
    /// [`SettingsError::NoSetting`]; [`SettingsError::Record`] where the change cannot be noted, and is not made then;
    /// [`SettingsError::Refused`] where the kernel does not take the value, or the process may not write it.
    pub fn set(&mut self, setting: Setting, value: impl fmt::Display) -> Result<(), SettingsError> {
        if self.found(setting).is_none() {
            return Err(SettingsError::NoSetting { setting });
        }
        let mut noted = self.record.clone();
        // Choosing an advisor changes what it advises.
        let also = (setting == Setting::AdvisorMode && self.found(Setting::PagesToScan).is_some())
            .then_some(Setting::PagesToScan);
        for changes in [Some(setting), also].into_iter().flatten() {
            if !noted.changed.contains(&changes) {
                noted.changed.push(changes);
            }
        }
        if noted != self.record {
            noted.store(&self.paths.record)?;
            self.record = noted;
        }
        Ok(write(&self.paths.sysfs, setting, &value.to_string())?)
    }

    /// Puts the changed settings back and removes the record. Dropping does the same, but cannot say what went wrong.
    ///
    /// # Errors
    /// [`SettingsError::Partly`] names what was refused; the record is kept then, and [`restore_left_over`] can try
    /// again. [`SettingsError::Record`] where all is put back but the record cannot be removed.
    pub fn restore(mut self) -> Result<Vec<PutBack>, SettingsError> {
        self.settled = true;
        finish(&self.paths, &self.record)
    }
}

impl Drop for Saved {
    fn drop(&mut self) {
        if !self.settled {
            // What is refused stays in the record, for the next run to put back and to tell.
            let _ = finish(&self.paths, &self.record);
        }
    }
}

/// Puts back what a run that was killed had changed, and removes its record. `None` where there is no record.
///
/// # Errors
/// [`SettingsError::Busy`] where the record's run is alive; [`SettingsError::Record`] and
/// [`SettingsError::NotARecord`] where it cannot be used; [`SettingsError::Partly`] names what was refused, and keeps
/// the record.
pub fn restore_left_over(paths: &Paths) -> Result<Option<Restored>, SettingsError> {
    // Without a record nothing is made, not even the lock: asking needs no rights then.
    if Record::load(&paths.record)?.is_none() {
        return Ok(None);
    }
    let _lock = lock(&paths.record)?;
    // Whoever held the lock until now may have put all back.
    let Some(record) = Record::load(&paths.record)? else { return Ok(None) };
    let put_back = finish(paths, &record)?;
    Ok(Some(Restored { pid: record.pid, put_back }))
}
