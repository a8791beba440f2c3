// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many mappings the process may still make.
//!
//! Linux lets a process have `vm.max_map_count` mappings (65,530 unless set). A page that is mapped over in the middle of a
//! mapping makes two more of it. Whoever reaches the limit does not only fail itself: from then on every `mmap` and
//! `munmap` of the process may fail, and so does `malloc`. So an operation that may add mappings reserves them first, and
//! a reserve is left for the rest of the process.
//!
//! Counting means reading `/proc/self/maps`, which takes longer the more there are (tens of milliseconds near the limit).
//! So it is done rarely. Between two counts there are two figures: the *worst case* (each call adds two) and the *likely
//! case* (what the layouts of guest memory grew by; the kernel joins what the layout joins, mostly). What is wanted is
//! likely too: a call adds one mapping for each of its ends that lies inside one. A reservation is
//! granted when the worst case stays below the reserve, or when the likely case does and the two differ by less than half
//! the reserve: then the reserve pays for what the likely case got wrong. Otherwise the count is made anew. What would have
//! to be refused is refused by the last count if that is recent: counting never takes more than a twentieth of the time.
//!
//! All budgets of a process share these figures, for they share the mappings.

use std::{
    io,
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::kernel::{Call, Kernel};

/// Mappings made since the process began, if each call added as many as it can. Never falls but for calls not made.
static WORST: AtomicI64 = AtomicI64::new(0);
/// Mappings made since the process began, as the layouts have it.
static LIKELY: AtomicI64 = AtomicI64::new(0);

/// Mappings that a call which maps over, or protects, a part of a mapping may add.
pub(crate) const PER_CALL: u64 = 2;
/// The least that is left to the rest of the process, unless the user says otherwise.
const LEAST_RESERVE: u64 = 1024;
/// One count in at least as many times its own duration, where it would only confirm a refusal.
const REST: u32 = 20;

/// An operation would bring the process too near to the limit of its mappings. Nothing was done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BudgetError {
    /// There are not that many left.
    #[error(
        "{wanted} more mappings do not fit: {in_use} of {limit} are in use, of which {reserve} are kept in reserve"
    )]
    Exhausted {
        /// Mappings that the process may have.
        limit: u64,
        /// Mappings that it has, as far as known.
        in_use: u64,
        /// Mappings asked for: those that are likely, or if none is, those that the calls may make at worst.
        wanted: u64,
        /// Mappings that are left to others.
        reserve: u64,
    },
    /// They could not be counted.
    #[error("the process's mappings cannot be counted: {call}: {source}")]
    Unknown {
        /// What failed.
        call: Call,
        /// What the kernel said.
        source: io::Error,
    },
}

#[derive(Debug, Clone, Copy)]
struct Count {
    limit: u64,
    mappings: u64,
    /// `WORST` and `LIKELY` when the count was begun.
    worst: i64,
    likely: i64,
    at: Instant,
    took: Duration,
}

/// Watches the number of mappings that the process has.
#[derive(Debug)]
pub struct VmaBudget {
    kernel: Kernel,
    /// A limit of the user's; otherwise the kernel's.
    limit: Option<u64>,
    reserve: Option<u64>,
    last: Mutex<Count>,
    counting: Mutex<()>,
}

impl VmaBudget {
    /// The kernel's limit, less a reserve of a sixteenth, or of 1024 if that is more.
    ///
    /// # Errors
    /// [`BudgetError::Unknown`].
    pub fn new(kernel: &Kernel) -> Result<Self, BudgetError> {
        Self::with(kernel, None, None)
    }

    /// The kernel's limit, less a reserve of this many mappings.
    ///
    /// # Errors
    /// [`BudgetError::Unknown`].
    pub fn with_reserve(kernel: &Kernel, reserve: u64) -> Result<Self, BudgetError> {
        Self::with(kernel, None, Some(reserve))
    }

    /// A limit of one's own instead of the kernel's, less a reserve of this many mappings.
    ///
    /// # Errors
    /// [`BudgetError::Unknown`].
    pub fn with_limit(kernel: &Kernel, limit: u64, reserve: u64) -> Result<Self, BudgetError> {
        Self::with(kernel, Some(limit), Some(reserve))
    }

    fn with(kernel: &Kernel, limit: Option<u64>, reserve: Option<u64>) -> Result<Self, BudgetError> {
        let last = Mutex::new(count(kernel, limit)?);
        Ok(Self { kernel: kernel.clone(), limit, reserve, last, counting: Mutex::new(()) })
    }

    /// Mappings that the process may have, the reserve included.
    pub fn limit(&self) -> u64 {
        self.last.lock().limit
    }

    /// Mappings that are left to the rest of the process.
    pub fn reserve(&self) -> u64 {
        self.reserve_of(self.limit())
    }

    fn reserve_of(&self, limit: u64) -> u64 {
        self.reserve.unwrap_or_else(|| LEAST_RESERVE.max(limit / 16))
    }

    /// Mappings in use, by the last count and what is likely to have come since. It is an estimate, and is too low where
    /// what the layouts take for one mapping is several for the kernel: neighbours that differ in what the layouts do not
    /// know, as in a userfaultfd registration ([`WriteFence`](crate::WriteFence), [`DirtyFilter`](crate::DirtyFilter),
    /// [`Tripwire`](crate::Tripwire)) that pages lost when they were mapped anew, or in advice. [`VmaBudget::recount`] says
    /// what is so; before operations bring the process near to the limit it is asked in any case.
    pub fn in_use(&self) -> u64 {
        likely(&self.last.lock())
    }

    /// Counts now; how many there are.
    ///
    /// # Errors
    /// [`BudgetError::Unknown`]; the last count stands.
    pub fn recount(&self) -> Result<u64, BudgetError> {
        let _one_at_a_time = self.counting.lock();
        self.count_again().map(|count| count.mappings)
    }

    fn count_again(&self) -> Result<Count, BudgetError> {
        let count = count(&self.kernel, self.limit)?;
        *self.last.lock() = count;
        Ok(count)
    }

    /// Sets `wanted.likely` mappings aside for calls that take pages home alone. What wants none is never refused: it
    /// gives back what it had, and at the limit that is the way out.
    pub(crate) fn reserve_for_home(&self, wanted: Wanted) -> Result<Reservation, BudgetError> {
        if wanted.likely == 0 {
            return Ok(Reservation { asked: false, ..Reservation::new(wanted) });
        }
        self.reserve_mappings(wanted)
    }

    /// Sets `wanted.likely` mappings aside. It is asked whether they fit also where none is likely, for the layout may be
    /// wrong: it keeps apart what the kernel has joined (two `Arc`s of one file), and a call in there cuts it in two.
    pub(crate) fn reserve_mappings(&self, wanted: Wanted) -> Result<Reservation, BudgetError> {
        if wanted == Wanted::default() {
            return Ok(Reservation::new(wanted));
        }
        let last = *self.last.lock();
        match self.verdict(&last, wanted.likely) {
            Verdict::Fits => return Ok(Reservation::new(wanted)),
            Verdict::Refused if last.at.elapsed() < last.took * REST => {
                return Err(self.exhausted(&last, wanted));
            }
            _ => {}
        }
        let _one_at_a_time = self.counting.lock();
        // Another thread may have counted meanwhile.
        let mut now = *self.last.lock();
        if now.at == last.at || !matches!(self.verdict(&now, wanted.likely), Verdict::Fits) {
            now = self.count_again()?;
        }
        match self.verdict(&now, wanted.likely) {
            Verdict::Fits => Ok(Reservation::new(wanted)),
            _ => Err(self.exhausted(&now, wanted)),
        }
    }

    fn exhausted(&self, count: &Count, wanted: Wanted) -> BudgetError {
        let limit = count.limit;
        let wanted = if wanted.likely == 0 { wanted.worst } else { wanted.likely };
        BudgetError::Exhausted { limit, in_use: likely(count), wanted, reserve: self.reserve_of(limit) }
    }

    fn verdict(&self, count: &Count, wanted: u64) -> Verdict {
        let reserve = self.reserve_of(count.limit);
        let ceiling = count.limit.saturating_sub(reserve);
        let worst = u64::try_from(WORST.load(Ordering::Relaxed).wrapping_sub(count.worst)).unwrap_or(0);
        let fits = |in_use: u64| in_use.saturating_add(wanted) <= ceiling;
        if fits(count.mappings.saturating_add(worst)) {
            Verdict::Fits
        } else if !fits(likely(count)) {
            Verdict::Refused
        } else if worst <= reserve / 2 {
            Verdict::Fits
        } else {
            Verdict::Unsure
        }
    }
}

enum Verdict {
    Fits,
    Refused,
    Unsure,
}

fn likely(count: &Count) -> u64 {
    count.mappings.saturating_add_signed(LIKELY.load(Ordering::Relaxed).wrapping_sub(count.likely))
}

fn count(kernel: &Kernel, limit: Option<u64>) -> Result<Count, BudgetError> {
    let unknown = |call| move |source| BudgetError::Unknown { call, source };
    let limit = match limit {
        Some(limit) => limit,
        None => kernel.mapping_limit().map_err(unknown(Call::MappingLimit))?,
    };
    let began = Instant::now();
    // Before the count: what is made during it is counted twice rather than not at all.
    let (worst, likely) = (WORST.load(Ordering::Relaxed), LIKELY.load(Ordering::Relaxed));
    let mappings = kernel.count_mappings().map_err(unknown(Call::CountMappings))?;
    let at = Instant::now();
    Ok(Count { limit, mappings, worst, likely, at, took: at - began })
}

/// Mappings that have gone, a layout and all.
pub(crate) fn gone(mappings: u64) {
    LIKELY.fetch_sub(signed(mappings), Ordering::Relaxed);
}

/// Mappings that calls may add.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// If each call adds as many as it can.
    pub(crate) worst: u64,
    /// By the layout. A boundary that two operations of a batch share is counted for both: a batch may be refused that
    /// would just have fitted.
    pub(crate) likely: u64,
}

/// Mappings set aside for an operation in flight. Dropping it without settling gives them back.
#[derive(Debug)]
#[must_use = "the mappings are given back when this is dropped"]
pub(crate) struct Reservation {
    wanted: Wanted,
    /// Whether it was asked if they fit.
    asked: bool,
}

fn signed(mappings: u64) -> i64 {
    mappings.try_into().unwrap_or(i64::MAX)
}

impl Reservation {
    fn new(wanted: Wanted) -> Self {
        WORST.fetch_add(signed(wanted.worst), Ordering::Relaxed);
        LIKELY.fetch_add(signed(wanted.likely), Ordering::Relaxed);
        Self { wanted, asked: true }
    }

    /// What was set aside.
    pub(crate) fn wanted(&self) -> Wanted {
        self.wanted
    }

    /// Whether it was asked if they fit.
    pub(crate) fn asked(&self) -> bool {
        self.asked
    }

    /// The calls were made, and the layout grew by `grown` mappings.
    pub(crate) fn settle(mut self, grown: i64) {
        LIKELY.fetch_add(grown.wrapping_sub(signed(self.wanted.likely)), Ordering::Relaxed);
        self.wanted = Wanted::default();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        WORST.fetch_sub(signed(self.wanted.worst), Ordering::Relaxed);
        LIKELY.fetch_sub(signed(self.wanted.likely), Ordering::Relaxed);
    }
}
