// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The canonical view: what translates to what, without leaf sizes.
//!
//! A table may legitimately choose other leaf sizes than the model. Both then have the same
//! *extents*: the longest runs of addresses whose outputs follow each other under the same rights.
//! They are cheap where a view by granule is not (one leaf of 1 GiB is 262,144 of them).

use crate::op::{Access, MemType};

/// A run of guest addresses that translate to a run of output addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Where the run begins.
    pub gpa: u64,
    /// Its length in bytes.
    pub size: u64,
    /// The output address of its first byte.
    pub out: u64,
    /// The rights that were granted.
    pub access: Access,
    /// Whether a write goes through without a further fault: granted, and not withheld for logging.
    pub writable: bool,
    /// The memory type.
    pub mem: MemType,
}

/// Joins neighbours, so that two tables translate alike exactly if their coalesced extents are
/// equal. The input must ascend by address; facts about accesses are no part of it, because they
/// are kept by leaf.
pub fn coalesce<I>(extents: I) -> impl Iterator<Item = Extent>
where
    I: IntoIterator<Item = Extent>,
{
    let mut extents = extents.into_iter().peekable();
    std::iter::from_fn(move || {
        let mut run = extents.next()?;
        while let Some(next) = extents.next_if(|next| follows(&run, next)) {
            run.size += next.size;
        }
        Some(run)
    })
}

fn follows(run: &Extent, next: &Extent) -> bool {
    run.gpa.checked_add(run.size) == Some(next.gpa)
        && run.out.checked_add(run.size) == Some(next.out)
        && (run.access, run.writable, run.mem) == (next.access, next.writable, next.mem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_join_only_if_everything_continues() {
        let piece =
            |gpa, out, writable| Extent { gpa, size: 0x1000, out, access: Access::RW, writable, mem: MemType::Wb };
        let joined: Vec<_> = coalesce([
            piece(0x0000, 0x8000, true),
            piece(0x1000, 0x9000, true),
            piece(0x2000, 0xa000, false),
            piece(0x4000, 0xc000, false),
            piece(0x5000, 0xf000, false),
        ])
        .map(|extent| (extent.gpa, extent.size))
        .collect();
        assert_eq!(joined, [(0, 0x2000), (0x2000, 0x1000), (0x4000, 0x1000), (0x5000, 0x1000)]);
    }
}
