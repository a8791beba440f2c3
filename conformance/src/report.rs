// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! All that is checked on one machine, and what came of it.

use std::sync::atomic::Ordering;

use indicatif::ProgressBar;
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use thiserror::Error;

use crate::change::{How, Seen, seen};
use crate::emulator::{Lost, Tools};
use crate::entries::{Entries, EntriesError, check};
use crate::facts::{Facts, Lose, race};
use crate::machine::Machine;
use crate::mmu::Mmu;
use crate::plants::{Plant, is_caught, sequences_miss_flushes};
use crate::sequence::{Divergence, Sequences};
use crate::vmm::VmmError;

/// How much is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// What everything random is made of.
    pub seed: u64,
    /// So many sequences, or as many as make [`Settings::accesses`].
    pub cases: Option<u64>,
    /// See [`Settings::cases`].
    pub accesses: u64,
    /// Leaves of each level of which every bit is turned.
    pub leaves: usize,
    /// Operations while a guest writes.
    pub rounds: u64,
}

/// What came of one machine.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Its name.
    pub machine: String,
    /// The seed.
    pub seed: u64,
    /// Sequences.
    pub cases: u64,
    /// Accesses of guests, in sequences and through single entries.
    pub accesses: u64,
    /// Of those in sequences, those that reached data.
    pub reached: u64,
    /// Faults whose class, and address and level where the machine reports them, were compared.
    pub faults_checked: u64,
    /// Times that model and MMU, or checker and MMU, disagreed; facts that were lost; guests that saw other than they must.
    pub divergences: u64,
    /// Faults on rights that had been raised since the entry was cached.
    pub spurious: u64,
    /// Flushes that the tables asked for.
    pub flushes: u64,
    /// Single entries.
    pub entries: Entries,
    /// Facts under way.
    pub facts: Facts,
    /// How often they were looked for again, where an emulator can lose one itself.
    pub facts_again: u64,
    /// What a guest sees of `change_pte`.
    pub change: Seen,
    /// What a guest sees of pages that are zapped instead.
    pub zap: Seen,
    /// Planted faults, and how many were noticed.
    pub plants: u64,
    /// See [`Report::plants`].
    pub plants_caught: u64,
    /// What disagreed, for people.
    #[serde(skip)]
    pub shown: Vec<String>,
}

/// Why a machine was not checked to the end.
#[derive(Debug, Error)]
pub enum Failure {
    /// The machine.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The VMM on it.
    #[error(transparent)]
    Vmm(#[from] VmmError),
}

type Run = dyn Fn(&Tools, &Settings, &ProgressBar) -> Result<Report, Failure>;

/// A machine that can be started and checked.
pub struct Candidate {
    /// Its name.
    pub name: String,
    run: Box<Run>,
}

impl std::fmt::Debug for Candidate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Candidate {
    /// The machine that `start` starts.
    pub fn new<M: Machine>(name: &str, start: impl Fn(&Tools) -> Result<M, Lost> + 'static) -> Self {
        let run = move |tools: &Tools, settings: &Settings, progress: &ProgressBar| {
            examine(start(tools)?, settings, progress)
        };
        Self { name: name.to_owned(), run: Box::new(run) }
    }

    /// Starts and checks it.
    ///
    /// # Errors
    /// [`Failure`]: it is not here, or did not come to an end.
    pub fn run(&self, tools: &Tools, settings: &Settings, progress: &ProgressBar) -> Result<Report, Failure> {
        (self.run)(tools, settings, progress)
    }
}

/// A seed of its own for each machine, so that one alone sees what it sees among others.
fn rng(settings: &Settings, name: &str) -> ChaCha8Rng {
    let name = name.bytes().fold(0_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    ChaCha8Rng::seed_from_u64(settings.seed ^ name.rotate_left(32))
}

/// Everything, on one machine.
fn examine<M: Machine>(machine: M, settings: &Settings, progress: &ProgressBar) -> Result<Report, Failure> {
    let name = machine.name().to_owned();
    let rng = &mut rng(settings, &name);
    let mmu = Mmu::new(machine);
    let (mut shown, mut divergences) = (Vec::new(), 0);
    let mut wrong = |what: String| {
        divergences += 1;
        shown.push(what);
    };
    progress.set_message(format!("{name}: change_pte"));
    let (change, zap) = (seen(&mmu, How::Change)?, seen(&mmu, How::Zap)?);
    let breaks = if mmu.machine().breaks() { change.pages } else { 0 };
    promised(&change, &zap, breaks).into_iter().for_each(&mut wrong);
    progress.set_message(format!("{name}: facts"));
    let mut facts = race(&mmu, settings.rounds, Lose::Nothing, rng)?;
    let mut facts_again = 0;
    if !facts.is_clean() && !mmu.machine().sets_facts_at_once() {
        facts_again = 1;
        facts = race(&mmu, settings.rounds, Lose::Nothing, rng)?;
    }
    if settings.rounds > 100 && [facts.moved, facts.used, facts.zapped, facts.repointed].contains(&0) {
        wrong(format!("there was nothing to lose: {facts:?}"));
    }
    if !facts.is_clean() {
        wrong(format!("facts were lost: {facts:?}"));
    }
    progress.set_message(format!("{name}: single entries"));
    let entries = match check(&mmu, settings.leaves, rng) {
        Ok(entries) => entries,
        Err(EntriesError::Vmm(error)) => return Err(error.into()),
        Err(EntriesError::Mismatch(mismatch)) => {
            wrong(mismatch.to_string());
            Entries::default()
        }
    };
    progress.set_message(format!("{name}: planted faults"));
    let (mut plants, mut plants_caught) = (0, 0);
    for plant in Plant::ALL {
        let Some(caught) = is_caught(&mmu, plant)? else { continue };
        plants += 1;
        plants_caught += u64::from(caught);
        if !caught {
            wrong(format!("nothing was noticed of {plant:?}"));
        }
    }
    for lose in Lose::ALL {
        let caught = lose.shows(&race(&mmu, LOSING, lose, rng)?);
        plants += 1;
        plants_caught += u64::from(caught);
        if !caught {
            wrong(format!("nothing was noticed of {lose:?} that were lost"));
        }
    }
    if let Some(noticed) = sequences_miss_flushes(&mmu, 200, rng) {
        plants += 1;
        plants_caught += u64::from(noticed.is_some());
        if noticed.is_none() {
            wrong("random sequences without a flush disagree with nothing".to_owned());
        }
    }
    let counts = mmu.counts();
    let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let before = [&counts.accesses, &counts.reached, &counts.faults, &counts.spurious, &counts.flushes].map(load);
    let cases = sequences(&mmu, settings, entries.accesses, rng, progress, &mut wrong);
    let after = [&counts.accesses, &counts.reached, &counts.faults, &counts.spurious, &counts.flushes].map(load);
    let [accesses, reached, faults_checked, spurious, flushes] =
        std::array::from_fn(|number| after[number] - before[number]);
    if reached * 5 < accesses {
        wrong(format!("of {accesses} accesses {reached} reached data: too few to say anything"));
    }
    if spurious != 0 && !mmu.machine().keeps_absent() {
        wrong(format!("{spurious} faults on rights that were there already"));
    }
    Ok(Report {
        machine: name,
        seed: settings.seed,
        cases,
        accesses: accesses + entries.accesses,
        reached,
        faults_checked,
        divergences,
        spurious,
        flushes,
        entries,
        facts,
        facts_again,
        change,
        zap,
        plants,
        plants_caught,
        shown,
    })
}

/// Operations in which something is lost on purpose.
const LOSING: u64 = 60;

/// What a guest was promised and did not see.
fn promised(change: &Seen, zap: &Seen, breaks: u64) -> Vec<String> {
    let mut broken = Vec::new();
    let mut rule = |holds: bool, what: &str, seen: &Seen| {
        if !holds {
            broken.push(format!("{what}: {seen:?}"));
        }
    };
    for seen in [change, zap] {
        rule(seen.mismatches == 0, "a guest read other bytes than it must", seen);
        rule(seen.other_faults == 0, "a guest faulted for nothing", seen);
    }
    rule(change.read_faults == 0, "a guest faulted on a page that was repointed", change);
    rule(change.write_faults == change.stores, "a store to a page that was repointed faults once", change);
    rule(
        change.breaks == breaks,
        "a page is broken before it is repointed where that is asked for, and only there",
        change,
    );
    rule(change.passes > change.pages / 16, "a guest reads while pages are repointed", change);
    rule(zap.read_faults == zap.pages, "a page that was zapped faults once", zap);
    broken
}

/// Divergences after which no more sequences are run: each takes long to shrink.
const ENOUGH: u64 = 3;

fn sequences<M: Machine>(
    mmu: &Mmu<M>,
    settings: &Settings,
    already: u64,
    rng: &mut impl Rng,
    progress: &ProgressBar,
    wrong: &mut impl FnMut(String),
) -> u64 {
    let sequences = Sequences::new(mmu.clone());
    let start = mmu.counts().accesses.load(Ordering::Relaxed);
    let done = || mmu.counts().accesses.load(Ordering::Relaxed) - start + already;
    let (mut cases, mut found) = (0, 0);
    progress.set_length(settings.cases.unwrap_or(settings.accesses));
    let name = mmu.machine().name().to_owned();
    progress.set_message(format!("{name}: sequences"));
    while found < ENOUGH && settings.cases.map_or(done() < settings.accesses, |most| cases < most) {
        cases += 1;
        progress.set_position(if settings.cases.is_some() { cases } else { done() });
        // Each by a seed of its own: what one draws does not move the others.
        let mut rng = ChaCha8Rng::seed_from_u64(rng.random());
        if let Err(divergence) = sequences.case(&mut rng) {
            found += 1;
            let Divergence { ops, .. } = &divergence;
            wrong(format!("model and MMU disagree after {} operations:\n{divergence}", ops.len()));
        }
    }
    cases
}
