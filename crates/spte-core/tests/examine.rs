// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What contradicts itself in a format is found, and the tests' own formats are in order.

mod common;

use common::{Tiny, flavours};
use notifier_core::{Access, OutputAddr};
use spte_core::examine::{Flaw, examine};
use spte_core::format::{Format, FormatError, LeafSpec, Level, NotPresent};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing, and a table that is gone, look alike.
    DeadIsClaimed,
    /// The claim bit is part of the address.
    ClaimsAddress,
    /// Hardware writes the claim bit.
    ClaimsHardware,
    /// Bytes are swapped on the way in and not on the way out.
    SwapsOnce,
    /// A link leads to the first table of all.
    LinksToZero,
    /// A change of rights drops a claim.
    DropsClaim,
    /// Nothing can be a leaf.
    MakesNothing,
}

struct Flawed(Tiny, Fault);

impl Flawed {
    fn has(&self, fault: Fault) -> bool {
        self.1 == fault
    }
}

impl Format for Flawed {
    type Attrs = u8;

    spte_drive::forward! {
        name geometry level_number kind spec set_spte write_protect upgrade is_young make_old make_young is_dirty make_clean touch
        split collapse merge_facts transition check
    }

    fn not_present(&self, level: Level) -> NotPresent {
        let values = self.0.not_present(level);
        if self.has(Fault::DeadIsClaimed) { NotPresent { dead: values.claimed, ..values } } else { values }
    }
    fn claim_bit(&self) -> u64 {
        if self.has(Fault::ClaimsAddress) { common::PAGE } else { self.0.claim_bit() }
    }
    fn hardware_bits(&self, level: Level, raw: u64) -> u64 {
        let claim = if self.has(Fault::ClaimsHardware) { self.claim_bit() } else { 0 };
        self.0.hardware_bits(level, raw) | claim
    }
    fn memory_of(&self, raw: u64) -> u64 {
        if self.has(Fault::SwapsOnce) { raw.swap_bytes() } else { raw }
    }
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        self.0.table(level, if self.has(Fault::LinksToZero) { OutputAddr::new(0) } else { child })
    }
    fn leaf(&self, level: Level, spec: &LeafSpec<u8>) -> Result<u64, FormatError> {
        match self.has(Fault::MakesNothing) {
            true => Err(FormatError::NoLeaf { number: self.level_number(level) }),
            false => self.0.leaf(level, spec),
        }
    }
    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        let kept = if self.has(Fault::DropsClaim) { !self.claim_bit() } else { !0 };
        self.0.with_access(level, raw, access).map(|raw| raw & kept)
    }
}

#[test]
fn what_the_engine_is_tested_with_is_in_order() {
    for format in flavours() {
        assert_eq!(examine(&format, 0), Ok(()), "{}", format.name);
    }
}

#[test]
fn what_contradicts_itself_is_found() {
    let tiny = flavours().into_iter().find(|format| format.name == "claim").unwrap();
    for (fault, expected) in [
        (Fault::DeadIsClaimed, "absent, claimed and dead are told apart"),
        (Fault::ClaimsAddress, "ageing and cleaning keep the claim, and where the leaf leads"),
        (Fault::ClaimsHardware, "the claim bit is none of hardware's"),
        (Fault::SwapsOnce, "raw_of undoes memory_of"),
        (Fault::LinksToZero, "a link is a link to its table"),
        (Fault::DropsClaim, "with_access keeps the claim, and where the leaf leads"),
        (Fault::MakesNothing, "some leaf with rights can be made for some output"),
    ] {
        let found = examine(&Flawed(tiny, fault), 0).unwrap_err();
        assert_eq!(found.rule, expected, "{fault:?}: {found}");
    }
    let flaw = Flaw { raw: 5, number: -1, rule: "so it is" };
    assert_eq!(flaw.to_string(), "entry 0x0000000000000005 at level -1: so it is");
}
