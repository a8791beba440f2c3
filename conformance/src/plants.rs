// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults that are planted, each of which the machine has to notice: what agrees with everything checks nothing.
//!
//! A table with a few pages is written by our crates and answers as it must. Then one thing in it is made wrong behind the
//! engine's back, and at least one access must come to something else.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use notifier_core::{Access, Gpa, OutputAddr};
use rand::Rng;
use spte_core::format::{Format, Kind, LeafSpec, Level};
use spte_model::TouchKind;

use crate::emulator::Lost;
use crate::machine::{Class, Exit, Machine};
use crate::mmu::{Mmu, Without, slot};
use crate::sequence::{Sequences, reserved};
use crate::vmm::{Vmm, VmmError};

/// What is made wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plant {
    /// A leaf leads to the page behind the right one.
    Output,
    /// Writing is granted that was not.
    Write,
    /// Writing is missing that was granted.
    NoWrite,
    /// A leaf is not there.
    Absent,
    /// A leaf stands in the slot behind its own.
    Slot,
    /// A page stands one level too high, where the link to its table was.
    Level,
    /// A link leads to a table of the level below its own child's.
    Link,
    /// A leaf's bytes are in the other order.
    Order,
    /// The root is another table.
    Root,
    /// A page was unmapped and nothing flushed.
    Flush,
}

impl Plant {
    /// All.
    pub const ALL: [Self; 10] = [
        Self::Output,
        Self::Write,
        Self::NoWrite,
        Self::Absent,
        Self::Slot,
        Self::Level,
        Self::Link,
        Self::Order,
        Self::Root,
        Self::Flush,
    ];
}

/// Three pages in a row: one that may be written, one that may not, and one that is not there; and a page far behind.
struct Pages {
    first: u64,
    outputs: [u64; 2],
}

/// What accesses come to, in order.
fn answers<M: Machine>(vmm: &Vmm<M>, pages: &Pages) -> Result<Vec<Result<u64, Class>>, VmmError> {
    let mut answers = Vec::new();
    for page in 0..3 {
        for kind in [TouchKind::Read, TouchKind::Write] {
            let at = pages.first + page * vmm.granule + 0x80;
            let answer = match vmm.access(at, kind, 0x1234_5678_9abc_0000 | page)? {
                // Where a store went is seen in the first two pages.
                Exit::Done { .. } if kind == TouchKind::Write => {
                    let mut hit = 0;
                    for output in pages.outputs.map(|output| output + 0x80) {
                        if vmm.ground.memory.load(output) != output {
                            vmm.ground.memory.store(output, output);
                            hit = output;
                        }
                    }
                    Ok(hit)
                }
                Exit::Done { value } => Ok(value),
                Exit::Fault(fault) => Err(fault.class),
                Exit::Kicked => return Err(VmmError::Wrong(format!("kicked out of an access at {at:#x}"))),
            };
            answers.push(answer);
        }
    }
    Ok(answers)
}

/// Plants one fault: whether the machine noticed. `None` where the fault cannot be on this machine: it caches nothing, or has too
/// few levels.
///
/// # Errors
/// [`VmmError`], also where the machine does not even answer right before.
pub fn is_caught<M: Machine>(mmu: &Mmu<M>, plant: Plant) -> Result<Option<bool>, VmmError> {
    let mut vmm = Vmm::new(mmu.clone(), |page| page)?;
    let granule = vmm.granule;
    // In a table of their own, where that is possible: what is wrong with it leaves the guest its code.
    let apart = reserved(vmm.table.format(), &vmm.ground);
    let room = 1 << mmu.machine().driven().shape.gpa_bits();
    let first = if apart.end + 16 * granule <= room { apart.end } else { apart.start - 16 * granule };
    let pages = Pages { first, outputs: [0, 1].map(|page| vmm.ground.data.start + (8 + page) * granule) };
    let rights = [Access::RWX, Access::RX];
    for (page, rights) in rights.into_iter().enumerate() {
        vmm.map(pages.first + page as u64 * granule, pages.outputs[page], granule, rights)?;
    }
    let before = answers(&vmm, &pages)?;
    let [own, read] = pages.outputs.map(|output| Ok(output + 0x80));
    let right = [own, own, read, Err(Class::Denied), Err(Class::Absent), Err(Class::Absent)];
    if before != right {
        return Err(VmmError::Wrong(format!("before anything was planted: {before:x?}, not {right:x?}")));
    }
    let format = vmm.table.format().clone();
    let rows = vmm.table.walk(Gpa::new(pages.first));
    let slot = |level: Level, at: u64| slot(&vmm.table, level, at);
    let memory = Arc::clone(&vmm.ground.memory);
    let edited = RefCell::new(Vec::new());
    let edit = |slot: u64, raw: u64| {
        edited.borrow_mut().push((slot, memory.word(slot).swap(format.memory_of(raw), Ordering::AcqRel)));
    };
    let Some(leaf) = rows.last().copied() else { return Ok(None) };
    let spec = format.spec(leaf.level, leaf.raw);
    let made = |spec: LeafSpec<_>| format.leaf(leaf.level, &spec).map_err(crate::vmm::failed("a leaf", pages.first));
    let own = slot(leaf.level, pages.first);
    let mut root = vmm.table.root();
    match plant {
        Plant::Output => edit(own, made(LeafSpec { output: OutputAddr::new(pages.outputs[1]), ..spec })?),
        Plant::Write => {
            let output = OutputAddr::new(pages.outputs[1]);
            edit(slot(leaf.level, pages.first + granule), made(LeafSpec { output, ..spec })?);
        }
        Plant::NoWrite => edit(own, made(LeafSpec { access: Access::RX, dirty: false, ..spec })?),
        Plant::Absent => edit(own, format.not_present(leaf.level).absent),
        Plant::Slot => {
            edit(slot(leaf.level, pages.first + 2 * granule), leaf.raw);
            edit(own, format.not_present(leaf.level).absent);
        }
        Plant::Level => match rows.iter().rev().nth(1) {
            Some(link) => edit(slot(link.level, pages.first), leaf.raw),
            None => return Ok(None),
        },
        Plant::Link => match (rows.iter().rev().nth(1), rows.iter().rev().nth(2)) {
            // The lowest link, where a link to its table stood.
            (Some(low), Some(high)) => edit(slot(high.level, pages.first), low.raw),
            _ => return Ok(None),
        },
        Plant::Order => edit(own, format.raw_of(format.memory_of(leaf.raw).swap_bytes())),
        Plant::Root => match rows.iter().rev().nth(1) {
            Some(link) => match link.kind {
                // The guest's own page is not mapped by it: an access does not even begin. What the last table is as a root
                // depends on the format; a page of nothing is a root to all.
                Kind::Table(_) => {
                    let empty = vmm.ground.data.start + 0x10_0000;
                    let bytes = format.geometry().table_bytes(format.geometry().top()).max(0x1000) as u64;
                    (empty..empty + bytes).step_by(8).for_each(|word| {
                        memory.word(word).store(
                            format.memory_of(format.not_present(format.geometry().top()).absent),
                            Ordering::Release,
                        );
                    });
                    root = OutputAddr::new(empty);
                }
                _ => return Ok(None),
            },
            None => return Ok(None),
        },
        Plant::Flush => {
            if !mmu.machine().caches() {
                return Ok(None);
            }
            mmu.leave_out(Without::Flushes);
            let unmapped = vmm.table.unmap(Vmm::<M>::range(pages.first, granule)?);
            mmu.leave_out(Without::Nothing);
            unmapped.map_err(crate::vmm::failed("unmap", pages.first))?;
            let after = answers(&vmm, &pages)?;
            // The right answer of the table as it is now would be a fault.
            return Ok(Some(after[0] != Err(Class::Absent)));
        }
    }
    mmu.machine().begin(root)?;
    let after = answers(&vmm, &pages);
    // The engine must find its tables as it left them, but for what hardware wrote.
    for (slot, raw) in edited.borrow().iter().rev() {
        memory.word(*slot).store(*raw, Ordering::Release);
    }
    drop(vmm);
    let machine = mmu.machine();
    machine.ground().fill(|number| machine.code(number));
    match after {
        Ok(after) => Ok(Some(after != before)),
        // The guest came back in a way that it never does.
        Err(VmmError::Lost(Lost::Answer(_))) => Ok(Some(true)),
        Err(error) => Err(error),
    }
}

/// Whether random sequences notice that flushes are missing: after how many, of at most `cases`. `None` where nothing is cached.
pub fn sequences_miss_flushes<M: Machine>(mmu: &Mmu<M>, cases: u64, rng: &mut impl Rng) -> Option<Option<u64>> {
    if !mmu.machine().caches() {
        return None;
    }
    let sequences = Sequences::new(mmu.clone());
    mmu.leave_out(Without::Flushes);
    let noticed = (1..=cases).find(|_| sequences.diverges(rng));
    mmu.leave_out(Without::Nothing);
    // What went astray is put right.
    let machine = mmu.machine();
    machine.ground().fill(|number| machine.code(number));
    Some(noticed)
}
