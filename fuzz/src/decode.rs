// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Raw entries of every format: any 64 bits at any level.
//!
//! The input is a format, its options, and entries of nine bytes each (level, raw little-endian). What has to hold:
//!
//! - Nothing panics, whatever the bits and the options.
//! - An entry that a check refuses names the entry, the level, a rule, and bits.
//! - What the engine takes for a link or a leaf, hardware takes for the same; what it takes for nothing, hardware does not
//!   follow. (Both are asked only of entries that the check passes.)
//! - The spec of a leaf, built again, gives the same bits, of those that a spec can say.
//! - Every operation of the format makes of an entry that passes one that passes, does what it says, and loses no fact.
//! - `spte decode` has an answer for it.

use std::ffi::OsString;

use notifier_core::{Access, OutputAddr};
use spte_arm64::{
    AccessedDirty as Management, BreakLevel, Granule, Shareability, Stage2, Stage2Attrs, Stage2Options, Start,
    bits as arm, software as arm_software,
};
use spte_core::format::{EntryError, Format, Kind, LeafSpec, Level, MAX_LEVELS, Touch, WriteProtect};
use spte_mips::{BigEndian, Cache, GpaOptions, GpaTable, PageSize, PteLayout, Width};
use spte_ppc::{BasePage, Radix, RadixAttrs, RadixOptions};
use spte_x86::{
    AccessedDirty, Ept, EptOptions, HardwareKind, Levels, LongMode, LongModeFormat, LongModeOptions, Npt, Usage,
    bits as x86, software,
};

use crate::bytes::Bytes;

/// What the entries of an input were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// The format; `None` where the options made none, or the input was for the command.
    pub format: Option<&'static str>,
    /// Leaves that passed the check.
    pub leaves: usize,
    /// Links that did.
    pub links: usize,
    /// Entries that held nothing, or a format's own data.
    pub others: usize,
    /// Entries that were refused.
    pub refused: usize,
}

/// Runs one input.
pub fn run(data: &[u8]) {
    look(data);
}

/// Runs one input, and says what was in it: so that a test can tell whether the laws were asked of anything.
pub fn look(data: &[u8]) -> Seen {
    let mut input = Bytes(data);
    let input = &mut input;
    let seen = match input.below(8) {
        0 => ept(input).map(|format| each(&format, input, Ept::hardware_kind, ept_says, |_, _| false, |a, b| a == b)),
        1 => LongMode::new(long_mode(input, false))
            .ok()
            .map(|format| each(&format, input, LongMode::hardware_kind, long_mode_says, |_, _| false, |a, b| a == b)),
        2 => Npt::new(long_mode(input, true)).ok().map(|format| {
            // The global bit means nothing in a nested leaf, and is refused where one is asked for.
            let global = |_, raw| raw & x86::long_mode::GLOBAL != 0;
            each(&format, input, Npt::hardware_kind, long_mode_says, global, |a, b| a == b)
        }),
        3 => stage2(input).map(|format| {
            // Where it executes is a right, and the user's bit is nobody else's.
            let same = |a: &Stage2Attrs, b: &Stage2Attrs| (a.memory, a.shareability) == (b.memory, b.shareability);
            each(&format, input, Stage2::hardware_kind, stage2_says, |_, _| false, same)
        }),
        4 => {
            command_on_entries(input);
            None
        }
        6 => radix(input).map(|format| {
            // The user's bit is nobody else's.
            let same = |a: &RadixAttrs, b: &RadixAttrs| a.storage == b.storage;
            // Nothing is ignored here: the format's own check refuses what it does not write.
            each(&format, input, Radix::hardware_kind, |_, _, _| u64::MAX, |_, _| false, same)
        }),
        7 => mips(input).map(|format| {
            each(&format, input, GpaTable::hardware_kind, |_, _, _| u64::MAX, |_, _| false, |a, b| a == b)
        }),
        _ => {
            command_on_words(input);
            None
        }
    };
    seen.unwrap_or_default()
}

/// Asks everything of `format` of entries, written as an input has them; `hardware` is what the architecture takes one for.
/// For formats that are wrong on purpose.
pub fn look_with<F: Format>(format: &F, entries: &[u8], hardware: impl Fn(&F, Level, u64) -> HardwareKind) -> Seen {
    each(format, &mut Bytes(entries), hardware, |_, _, _| 0, |_, _| false, |a, b| a == b)
}

// ---- formats with any options ---------------------------------------------------------------------------------------

fn levels(input: &mut Bytes<'_>) -> Levels {
    input.one_of(&[Levels::Four, Levels::Five])
}

fn cache_bits(input: &mut Bytes<'_>) -> Option<u8> {
    match input.byte() {
        bits @ 30..=60 => Some(bits),
        _ => None,
    }
}

fn ept(input: &mut Bytes<'_>) -> Option<Ept> {
    let options = EptOptions {
        levels: levels(input),
        physical_bits: 30 + input.below(26),
        execute_only: input.flag(),
        accessed_dirty: input.one_of(&[
            AccessedDirty::Enabled,
            AccessedDirty::Disabled,
            AccessedDirty::WriteProtectOnly,
        ]),
        mode_based_execute: input.flag(),
        suppress_ve: input.flag(),
        pages_2m: input.flag(),
        pages_1g: input.flag(),
        nx_huge_pages: input.flag(),
        l1tf_cache_bits: cache_bits(input),
    };
    Ept::new(options).ok()
}

fn long_mode(input: &mut Bytes<'_>, nested: bool) -> LongModeOptions {
    LongModeOptions {
        levels: levels(input),
        physical_bits: 30 + input.below(26),
        pages_1g: input.flag(),
        no_execute: input.flag(),
        protection_keys: input.flag() && !nested,
        encryption_bit: match input.byte() {
            bit @ 40..=55 => Some(bit),
            _ => None,
        },
        encrypt_tables: input.flag(),
        link_global_reserved: input.flag(),
        nx_huge_pages: input.flag(),
        l1tf_cache_bits: cache_bits(input),
    }
}

fn stage2(input: &mut Bytes<'_>) -> Option<Stage2> {
    let options = Stage2Options {
        granule: input.one_of(&[Granule::K4, Granule::K16, Granule::K64]),
        ipa_bits: 30 + input.below(26),
        physical_bits: 30 + input.below(26),
        lpa2: input.flag(),
        start: match input.byte() {
            level @ 0..=6 => Start::Level(level as i8 - 2),
            byte if byte & 1 == 1 => Start::SingleTable,
            _ => Start::FewestLevels,
        },
        fwb: input.flag(),
        xnx: input.flag(),
        accessed_dirty: input.one_of(&[Management::Software, Management::HardwareAccessed, Management::Hardware]),
        shareability: input.one_of(&[Shareability::Inner, Shareability::Outer, Shareability::NonShareable]),
        break_level: input.one_of(&[BreakLevel::Level0, BreakLevel::Level1, BreakLevel::Level2]),
    };
    Stage2::new(options).ok()
}

fn radix(input: &mut Bytes<'_>) -> Option<Radix> {
    let page = input.one_of(&[BasePage::K4, BasePage::K64]);
    Radix::new(RadixOptions { page, physical_bits: 30 + input.below(30), strong_order: input.flag() }).ok()
}

fn mips(input: &mut Bytes<'_>) -> Option<GpaTable<BigEndian>> {
    let mut options = GpaOptions {
        page: input.one_of(&[PageSize::K4, PageSize::K16, PageSize::K64]),
        width: input.one_of(&[Width::Standard, Width::Wide]),
        layout: input.one_of(&[PteLayout::Plain, PteLayout::Huge, PteLayout::HugeSplitting]),
        physical_bits: 30 + input.below(32),
        rixi: input.flag(),
        table_cache: Cache::from_bits(input.below(8)),
        ..GpaOptions::default()
    };
    // Near the end of what there is, or where it is by default.
    if input.flag() {
        let end = 1_u64.checked_shl(options.physical_bits.into()).unwrap_or(0);
        options.sentinels = OutputAddr::new(end.wrapping_sub(u64::from(input.byte()) << 14));
    }
    GpaTable::new(options).ok()
}

// ---- the bits of a leaf that its spec says --------------------------------------------------------------------------
// What is left out: bits that hardware ignores and nobody writes, the claim, and states that only an operation makes of a
// leaf (what a mitigation withheld, what a window denied).

fn ept_says(format: &Ept, level: Level, raw: u64) -> u64 {
    let options = format.options();
    let size = if level == Level::LEAF { 0 } else { x86::PAGE_SIZE };
    let facts = match options.accessed_dirty {
        AccessedDirty::Enabled => x86::ept::ACCESSED | x86::ept::DIRTY,
        AccessedDirty::Disabled => 0,
        AccessedDirty::WriteProtectOnly => x86::ept::ACCESSED,
    };
    let user = if options.mode_based_execute { x86::ept::USER_EXECUTE } else { 0 };
    let writes = if format.spec(level, raw).access.writable() {
        software::ept::HOST_WRITABLE | software::ept::MMU_WRITABLE
    } else {
        // Only together they say something that a spec can.
        0
    };
    x86::ept::RWX
        | x86::ept::MEMORY_TYPE
        | x86::ept::IGNORE_PAT
        | size
        | facts
        | user
        | software::MMU_PRESENT
        | x86::ADDRESS
        | software::ept::AD_TYPE
        | software::ept::SAVED
        | writes
        | software::ept::DIRTY_FACT
        | x86::ept::SUPPRESS_VE
}

fn long_mode_says<U: Usage>(format: &LongModeFormat<U>, level: Level, raw: u64) -> u64 {
    let keys = if format.options().protection_keys { x86::long_mode::PROTECTION_KEY } else { 0 };
    let writes = if format.spec(level, raw).access.writable() {
        software::long_mode::HOST_WRITABLE | software::long_mode::MMU_WRITABLE
    } else {
        0
    };
    // Bits 0 to 8: rights, cache, facts, PAT or page size, global.
    0x1ff | software::MMU_PRESENT | x86::ADDRESS | x86::long_mode::NO_EXECUTE | keys | writes
}

fn stage2_says(_: &Stage2, _: Level, _: u64) -> u64 {
    // Nothing is ignored here: the format's own check refuses what it does not write.
    !(arm_software::CLAIM | arm::FNXS)
}

// ---- laws -----------------------------------------------------------------------------------------------------------

const RIGHTS: [Access; 8] = [
    Access::empty(),
    Access::READ,
    Access::WRITE,
    Access::RW,
    Access::EXECUTE,
    Access::RX,
    Access::WRITE.union(Access::EXECUTE),
    Access::RWX,
];

/// How many entries of one input are looked at.
const MOST: usize = 16;

fn each<F: Format>(
    format: &F,
    input: &mut Bytes<'_>,
    hardware: impl Fn(&F, Level, u64) -> HardwareKind,
    says: impl Fn(&F, Level, u64) -> u64,
    unsaid: impl Fn(Level, u64) -> bool,
    same: impl Fn(&F::Attrs, &F::Attrs) -> bool,
) -> Seen {
    let mut seen = Seen { format: Some(format.name()), ..Seen::default() };
    // What passed before: partners for operations on two leaves of one level.
    let mut before: Vec<(Level, u64)> = Vec::new();
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        let Some(level) = Level::new(1 + input.below(MAX_LEVELS as u8)) else { break };
        let raw = input.word();
        let kind = format.kind(level, raw);
        let to_hardware = hardware(format, level, raw);
        if let HardwareKind::Impossible(why) = &to_hardware {
            names_a_rule(format, level, raw, why);
        }
        assert_eq!(format.raw_of(format.memory_of(raw)), raw, "memory order is not undone");
        if level <= format.geometry().top() {
            nothing_stays_nothing(format, level, raw);
        }
        match format.check(level, raw) {
            Err(why) => {
                seen.refused += 1;
                names_a_rule(format, level, raw, &why);
            }
            Ok(()) if level > format.geometry().top() => {}
            Ok(()) => match kind {
                Kind::Leaf => {
                    seen.leaves += 1;
                    // A leaf that was aged by taking its rights away is not present to hardware.
                    let aged = to_hardware == HardwareKind::NotPresent && !format.is_young(level, raw);
                    assert!(aged || to_hardware == HardwareKind::Leaf, "a leaf is {to_hardware:?} to hardware");
                    let raw = set(format, level, raw);
                    leaf(format, level, raw, says(format, level, raw), unsaid(level, raw));
                    for &(other_level, other) in &before {
                        two_leaves(format, (level, raw), (other_level, other), &same);
                        two_leaves(format, (other_level, other), (level, raw), &same);
                    }
                    before.push((level, raw));
                }
                Kind::Table(at) => {
                    seen.links += 1;
                    assert_eq!(to_hardware, HardwareKind::Table(at), "a link is something else to hardware");
                    link(format, level, raw, at);
                }
                Kind::Absent | Kind::Special | Kind::Claimed | Kind::Dead => {
                    seen.others += 1;
                    let followed = matches!(to_hardware, HardwareKind::Table(_) | HardwareKind::Leaf);
                    assert!(!followed, "{kind:?} is {to_hardware:?} to hardware");
                }
            },
        }
    }
    seen
}

fn names_a_rule<F: Format>(format: &F, level: Level, raw: u64, why: &EntryError) {
    assert_eq!(why.raw, raw, "another entry is refused");
    assert_eq!(why.number, format.level_number(level), "refused at another level");
    assert!(!why.rule.is_empty() && why.bits != 0, "no rule is named: {why}");
    assert!(!why.to_string().contains('\n'), "more than a line");
}

/// The three values that hold nothing stay what they are, whatever hardware writes to them.
fn nothing_stays_nothing<F: Format>(format: &F, level: Level, raw: u64) {
    let noise = raw & format.hardware_bits(level, format.not_present(level).absent);
    assert_eq!(format.kind(level, format.not_present(level).absent | noise), Kind::Absent);
    assert_eq!(format.kind(level, format.not_present(level).claimed | noise), Kind::Claimed);
    assert_eq!(format.kind(level, format.not_present(level).dead | noise), Kind::Dead);
}

fn passes<F: Format>(format: &F, level: Level, raw: u64, made_by: &str) {
    if let Err(why) = format.check(level, raw) {
        panic!("{made_by} made {raw:#018x}: {why}");
    }
}

fn still_leaf<F: Format>(format: &F, level: Level, raw: u64, made_by: &str) {
    passes(format, level, raw, made_by);
    assert_eq!(format.kind(level, raw), Kind::Leaf, "{made_by} made {raw:#018x}, no leaf");
}

fn link<F: Format>(format: &F, level: Level, raw: u64, at: OutputAddr) {
    let again = format.table(level, at).expect("a link that passes can be built");
    passes(format, level, again, "table");
    assert_eq!(format.kind(level, again), Kind::Table(at));
    assert_eq!(format.kind(level, raw ^ format.claim_bit()), Kind::Table(at), "a claimed link is a link");
}

/// Sets of leaves that hardware may hold as one; the leaf as one of its own, of which everything else is asked: the engine
/// takes a set apart before it changes a member.
fn set<F: Format>(format: &F, level: Level, raw: u64) -> u64 {
    let own = format.unmarked(level, raw);
    still_leaf(format, level, own, "unmarked");
    assert!(!format.in_set(level, own), "taken out of its set, and in it");
    let spec = format.spec(level, own);
    assert_eq!(format.spec(level, raw), spec, "a member of a set says something else than the leaf");
    assert_eq!(format.in_set(level, raw), raw != own, "marked by nothing");
    let (span, members) = (format.geometry().span(level), 1_usize << format.set_shift(level));
    if members == 1 {
        assert_eq!(format.set_member(level, own, 0), None, "a member of a set of one");
        return own;
    }
    // The engine makes no set of what is armed.
    let last = members - 1;
    for index in [0, 1, last].into_iter().filter(|_| !spec.armed) {
        let Some(member) = format.set_member(level, own, index) else { continue };
        let begins = spec.output.is_aligned(span * members as u64);
        assert!(begins, "a set of {members} begins with the leaf at {}", spec.output);
        still_leaf(format, level, member, "set_member");
        assert!(format.in_set(level, member), "a member without a mark");
        let output = OutputAddr::new(spec.output.as_u64() + index as u64 * span);
        assert_eq!(format.spec(level, member), LeafSpec { output, ..spec }, "member {index}");
    }
    own
}

fn leaf<F: Format>(format: &F, level: Level, raw: u64, says: u64, unsaid: bool) {
    let geometry = format.geometry();
    let span = geometry.span(level);
    let spec = format.spec(level, raw);
    let (young, dirty) = (format.is_young(level, raw), format.is_dirty(level, raw));
    assert!(spec.output.is_aligned(span), "the output of a leaf is not aligned to it");
    assert_eq!((spec.accessed, spec.dirty), (young, dirty), "the spec has other facts");
    assert!(!spec.armed || spec.access.writable(), "armed for a right that is not there");
    assert_eq!(format.kind(level, raw ^ format.claim_bit()), Kind::Leaf, "a claimed leaf is a leaf");

    // Built again.
    match format.leaf(level, &spec) {
        Ok(again) => {
            still_leaf(format, level, again, "leaf");
            assert_eq!(format.spec(level, again), spec, "the spec of what the spec made");
            let lost = (again ^ raw) & says;
            assert_eq!(lost, 0, "{raw:#018x} became {again:#018x}, from {spec:?}");
        }
        Err(why) => assert!(unsaid, "{raw:#018x} passes, and {spec:?} cannot be built: {why}"),
    }

    // Facts.
    let old = format.make_old(level, raw);
    still_leaf(format, level, old, "make_old");
    assert!(!format.is_young(level, old), "made old, and young");
    assert_eq!(format.is_dirty(level, old), dirty, "ageing changed the dirty fact");
    assert_eq!(format.make_old(level, old), old, "ageing twice is ageing once");
    let fresh = format.make_young(level, old);
    still_leaf(format, level, fresh, "make_young");
    assert!(format.is_young(level, fresh) && format.is_dirty(level, fresh) == dirty, "made young, facts differ");
    let clean = format.make_clean(level, raw);
    still_leaf(format, level, clean, "make_clean");
    assert!(!format.is_dirty(level, clean), "made clean, and dirty");
    assert_eq!(format.is_young(level, clean), young, "cleaning aged");
    assert_eq!(format.spec(level, clean).access, spec.access, "cleaning took a right for good");

    // Writing.
    for how in [WriteProtect::Arm, WriteProtect::Retain] {
        let protected = format.write_protect(level, raw, how);
        still_leaf(format, level, protected, "write_protect");
        assert!(!matches!(format.touch(level, protected, Access::WRITE), Touch::Allowed(_)), "protected, and writable");
        let now = format.spec(level, protected);
        assert_eq!(now.output, spec.output);
        assert_eq!(now.access.read_only(), spec.access.read_only(), "protecting changed another right");
        assert_eq!(format.is_young(level, protected), young, "protecting aged");
        if how == WriteProtect::Retain {
            assert_eq!(format.upgrade(level, protected), None, "retained, and upgradable");
            assert!(!now.access.writable(), "retained, and armed");
        }
    }
    if let Some(upgraded) = format.upgrade(level, raw) {
        assert!(spec.armed, "upgraded what was not armed");
        still_leaf(format, level, upgraded, "upgrade");
        let now = format.spec(level, upgraded);
        assert!(now.access.writable() && !now.armed && now.output == spec.output, "upgraded to {now:?}");
        assert!(!dirty || format.is_dirty(level, upgraded), "upgrading lost the dirty fact");
    }
    for access in RIGHTS {
        let Ok(changed) = format.with_access(level, raw, access) else { continue };
        still_leaf(format, level, changed, "with_access");
        let now = format.spec(level, changed);
        assert!(access.contains(now.access), "asked for {access}, got {}", now.access);
        assert_eq!(now.access & Access::RW, access & Access::RW, "asked for {access}, got {}", now.access);
        assert_eq!((now.output, now.accessed), (spec.output, spec.accessed), "rights changed something else");
        assert!(!dirty || now.dirty, "changing rights lost the dirty fact");
    }

    // What hardware does.
    for access in RIGHTS {
        let in_force = if spec.armed { spec.access.read_only() } else { spec.access };
        match format.touch(level, raw, access) {
            Touch::Allowed(touched) => {
                assert!(in_force.contains(access), "{access} was allowed by {spec:?}");
                still_leaf(format, level, touched, "touch");
                assert_eq!((touched ^ raw) & !format.hardware_bits(level, raw), 0, "hardware wrote another bit");
                assert_eq!(format.spec(level, touched).output, spec.output);
                assert!(!dirty || format.is_dirty(level, touched), "a touch lost the dirty fact");
                let told = format.is_dirty(level, touched) || !access.writable();
                assert!(told, "a write left no trace");
            }
            Touch::AccessFlag => assert!(!young, "an access flag fault on a young leaf"),
            Touch::Denied => assert!(!in_force.contains(access), "{access} was denied by {spec:?}"),
        }
    }

    // Another output, as change_pte does.
    for output in [0, span, spec.output.as_u64() ^ span, raw & !(span - 1), raw] {
        let output = OutputAddr::new(output);
        let Ok(moved) = format.set_spte(level, raw, output) else { continue };
        still_leaf(format, level, moved, "set_spte");
        let now = format.spec(level, moved);
        let expected = LeafSpec { output, access: spec.access.read_only(), armed: false, dirty: false, ..spec };
        assert_eq!(now, expected, "set_spte");
        assert_eq!(format.upgrade(level, moved), None, "repointed, and upgradable");
    }

    // Other sizes.
    if let Some(below) = level.below().filter(|below| geometry.level(*below).leaf) {
        let entries = geometry.entries(below);
        for index in [0, 1, (raw as usize) & (entries - 1), entries - 1] {
            let child = format.split(level, raw, index);
            still_leaf(format, below, child, "split");
            let now = format.spec(below, child);
            let output = spec.output.as_u64() + index as u64 * geometry.span(below);
            assert_eq!(now.output.as_u64(), output, "part {index} translates to elsewhere");
            // What a mitigation withheld from the larger leaf comes back.
            assert!(now.access.contains(spec.access), "split took rights away");
            assert_eq!(now.access.read_only() - Access::EXECUTE, spec.access.read_only() - Access::EXECUTE);
            assert_eq!(LeafSpec { output: spec.output, access: spec.access, ..now }, spec, "split changed more");
        }
    }
    let above = level.above().filter(|above| *above <= geometry.top());
    if let Some((above, whole)) = above.and_then(|above| Some((above, format.collapse(above, raw)?))) {
        still_leaf(format, above, whole, "collapse");
        let now = format.spec(above, whole);
        assert!(spec.access.contains(now.access), "collapse gave rights");
        assert_eq!(LeafSpec { access: spec.access, ..now }, spec, "collapse changed more");
        assert_eq!(format.spec(level, format.split(above, whole, 0)), spec, "collapse and split");
    }
    let same = format.transition(level, raw, raw);
    assert!(!same.break_first && !same.flush, "an entry that stays owes {same:?}");
    assert!(
        format.transition(level, raw, format.not_present(level).absent).flush || !young,
        "taking a leaf away owes nothing"
    );
}

fn two_leaves<F: Format>(
    format: &F,
    (level, raw): (Level, u64),
    (other_level, other): (Level, u64),
    same: &impl Fn(&F::Attrs, &F::Attrs) -> bool,
) {
    let merged = format.merge_facts(level, raw, other_level, other);
    still_leaf(format, level, merged, "merge_facts");
    let either = |fact: fn(&F, Level, u64) -> bool| fact(format, level, raw) || fact(format, other_level, other);
    assert_eq!(format.is_young(level, merged), either(F::is_young), "merging lost or made an accessed fact");
    assert_eq!(format.is_dirty(level, merged), either(F::is_dirty), "merging lost or made a dirty fact");
    assert_eq!(format.spec(level, merged).output, format.spec(level, raw).output);
    if level != other_level {
        return;
    }
    let transition = format.transition(level, raw, other);
    assert!(transition.flush || !transition.break_first, "what is broken is flushed");
    let granted = |raw: u64| match format.spec(level, raw) {
        spec if spec.armed => spec.access.read_only(),
        spec => spec.access,
    };
    let (was, now) = (format.spec(level, raw), format.spec(level, other));
    if was.output != now.output || !same(&was.attrs, &now.attrs) {
        assert!(transition.flush, "another translation owes nothing: {was:?} to {now:?}");
    }
    // A leaf that is aged may be left in TLBs: a stale answer to that is tolerated.
    if !granted(other).contains(granted(raw)) && format.is_young(level, other) {
        assert!(transition.flush, "rights taken away owe nothing: {was:?} to {now:?}");
    }
}

// ---- the command ----------------------------------------------------------------------------------------------------

const COMMAND_FORMATS: [&str; 8] =
    ["ept", "npt", "x86-64", "x86-64-la57", "arm64-s2", "ppc-radix", "mips64", "ppc-hpt"];

/// Runs `spte` in this process: its status and what it printed.
pub(crate) fn command(arguments: &[String], mut stdin: &[u8]) -> (u8, String, String) {
    let arguments = std::iter::once("spte").chain(arguments.iter().map(String::as_str)).map(OsString::from);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let status = spte_tool::cli::run(arguments, &mut stdin, &mut out, &mut err);
    let text = |bytes| String::from_utf8(bytes).expect("spte prints text");
    (status, text(out), text(err))
}

/// Options of every command that takes a format, good and bad ones.
pub(crate) fn options(input: &mut Bytes<'_>) -> Vec<String> {
    let mut all = vec![String::from("--format"), input.one_of(&COMMAND_FORMATS[..7]).into()];
    let which = input.byte();
    if which & 1 != 0 {
        all.push(format!("--hw-ad={}", input.one_of(&["on", "off"])));
    }
    if which & 2 != 0 {
        all.push(format!("--granule={}", input.one_of(&["4k", "16k", "64k"])));
    }
    if which & 4 != 0 {
        all.push(format!("--ipa-bits={}", 10 + input.below(50)));
    }
    if which & 8 != 0 {
        all.push(format!("--pa-bits={}", 30 + input.below(26)));
    }
    if which & 16 != 0 {
        all.push(format!("--levels={}", 2 + input.below(5)));
    }
    if which & 32 != 0 {
        all.push("--json".into());
    }
    all
}

fn failed_with_one_message(status: u8, err: &str) {
    assert_eq!(status, 2, "failed with another status");
    assert!(err.starts_with("spte: ") && err.ends_with('\n') && err.lines().count() == 1, "said {err:?}");
}

fn command_on_entries(input: &mut Bytes<'_>) {
    let mut arguments = vec![String::from("decode")];
    arguments.append(&mut options(input));
    if input.flag() {
        arguments.push(format!("--level={}", i16::from(input.below(10)) - 3));
    }
    let json = arguments.iter().any(|word| word == "--json");
    let mut values: Vec<u64> = Vec::new();
    while !input.is_empty() && values.len() < 4 {
        values.push(input.word());
    }
    if values.is_empty() {
        return;
    }
    arguments.extend(values.iter().map(|raw| format!("{raw:#x}")));
    let (status, out, err) = command(&arguments, &[]);
    if status != 0 {
        // Options that make no table, or a level that the format has not.
        return failed_with_one_message(status, &err);
    }
    assert_eq!(err, "");
    if json {
        assert_eq!(out.lines().count(), values.len(), "one object an entry");
        for (line, raw) in out.lines().zip(&values) {
            let object: serde_json::Value = serde_json::from_str(line).expect("an object");
            assert_eq!(object["raw"], format!("{raw:016x}"));
            let readings = object["readings"].as_array().expect("readings");
            assert!(!readings.is_empty(), "no level reads it");
            for reading in readings {
                let rule = &reading["rule_broken"]["rule"];
                assert_eq!(
                    reading["kind"] == "impossible",
                    rule.is_string(),
                    "impossible if and only if a rule is named"
                );
                fields_cover(reading, *raw);
            }
        }
    } else {
        let heads: Vec<String> = out.lines().filter(|line| !line.starts_with(' ')).map(String::from).collect();
        let expected: Vec<String> = values.iter().map(|raw| format!("{raw:016x}")).collect();
        assert_eq!(heads, expected, "one paragraph an entry");
    }
}

/// The fields of a reading cover every bit that is set, each once.
fn fields_cover(reading: &serde_json::Value, raw: u64) {
    let mut covered = 0_u64;
    for field in reading["fields"].as_array().expect("fields") {
        let bit = |name: &str| u32::try_from(field[name].as_u64().expect("a bit")).expect("a bit");
        let (high, low) = (bit("high"), bit("low"));
        assert!(low <= high && high < 64, "field {field}");
        let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
        assert_eq!(covered & mask, 0, "two fields have bits of {field}");
        covered |= mask;
        let value = format!("{:#x}", (raw & mask) >> low);
        assert_eq!(field["value"], value, "field {field} of {raw:#x}");
    }
    assert_eq!(raw & !covered, 0, "bits {:#x} of {raw:#x} are in no field", raw & !covered);
}

/// Words that need not be entries.
fn command_on_words(input: &mut Bytes<'_>) {
    let mut arguments = vec![String::from("decode")];
    arguments.append(&mut options(input));
    let text = String::from_utf8_lossy(input.rest());
    let words: Vec<String> = text.split_whitespace().filter(|word| !word.starts_with('-')).map(String::from).collect();
    if words.is_empty() || words.iter().any(|word| word.contains('\0')) {
        return;
    }
    let entry = |word: &String| match word.strip_prefix("0x") {
        Some(digits) => (1..=16).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_hexdigit()),
        None => word.len() == 16 && word.bytes().all(|digit| digit.is_ascii_hexdigit()),
    };
    let good = words.iter().all(entry);
    arguments.extend(words);
    let (status, _, err) = command(&arguments, &[]);
    if status != 0 {
        return failed_with_one_message(status, &err);
    }
    assert!(good, "took what is no entry");
    assert_eq!(err, "");
}
