// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A format that is another but for a few methods.

/// Methods of [`Format`](spte_core::format::Format) that do what those of `self.0` do, for a format that plants a fault in
/// another or listens to what it is asked.
///
/// Each is named: the compiler says which are missing, except for those that the trait itself has an answer for. A crate
/// that uses it depends on `notifier-core` and `spte-core`.
///
/// ```
/// use spte_core::format::{Format, Level};
///
/// /// No leaf is ever young.
/// struct Old<F>(F);
///
/// impl<F: Format> Format for Old<F> {
///     type Attrs = F::Attrs;
///     spte_drive::forward! {
///         name geometry level_number not_present claim_bit hardware_bits kind table leaf
///         spec set_spte with_access write_protect upgrade make_old make_young is_dirty make_clean touch split collapse
///         merge_facts set_shift in_set set_member unmarked transition equal_contents_transition flushes_before_refill
///         late_facts check memory_of raw_of
///     }
///     fn is_young(&self, _: Level, _: u64) -> bool {
///         false
///     }
/// }
/// ```
#[macro_export]
macro_rules! forward {
    (@name) => { $crate::forward! { @fn name() -> &'static str } };
    (@geometry) => { $crate::forward! { @fn geometry() -> &::spte_core::format::Geometry } };
    (@level_number) => { $crate::forward! { @fn level_number(level: ::spte_core::format::Level) -> i8 } };
    (@not_present) => {
        $crate::forward! { @fn not_present(level: ::spte_core::format::Level) -> ::spte_core::format::NotPresent }
    };
    (@claim_bit) => { $crate::forward! { @fn claim_bit() -> u64 } };
    (@hardware_bits) => { $crate::forward! { @of_entry hardware_bits() -> u64 } };
    (@kind) => { $crate::forward! { @of_entry kind() -> ::spte_core::format::Kind } };
    (@table) => {
        $crate::forward! {
            @fn table(level: ::spte_core::format::Level, child: ::notifier_core::OutputAddr)
                -> Result<u64, ::spte_core::format::FormatError>
        }
    };
    (@leaf) => {
        $crate::forward! {
            @fn leaf(level: ::spte_core::format::Level, spec: &::spte_core::format::LeafSpec<Self::Attrs>)
                -> Result<u64, ::spte_core::format::FormatError>
        }
    };
    (@spec) => { $crate::forward! { @of_entry spec() -> ::spte_core::format::LeafSpec<Self::Attrs> } };
    (@set_spte) => {
        $crate::forward! {
            @of_entry set_spte(output: ::notifier_core::OutputAddr) -> Result<u64, ::spte_core::format::FormatError>
        }
    };
    (@with_access) => {
        $crate::forward! {
            @of_entry with_access(access: ::notifier_core::Access) -> Result<u64, ::spte_core::format::FormatError>
        }
    };
    (@write_protect) => {
        $crate::forward! { @of_entry write_protect(how: ::spte_core::format::WriteProtect) -> u64 }
    };
    (@upgrade) => { $crate::forward! { @of_entry upgrade() -> Option<u64> } };
    (@is_young) => { $crate::forward! { @of_entry is_young() -> bool } };
    (@make_old) => { $crate::forward! { @of_entry make_old() -> u64 } };
    (@make_young) => { $crate::forward! { @of_entry make_young() -> u64 } };
    (@is_dirty) => { $crate::forward! { @of_entry is_dirty() -> bool } };
    (@make_clean) => { $crate::forward! { @of_entry make_clean() -> u64 } };
    (@touch) => {
        $crate::forward! { @of_entry touch(access: ::notifier_core::Access) -> ::spte_core::format::Touch }
    };
    (@split) => { $crate::forward! { @of_entry split(index: usize) -> u64 } };
    (@collapse) => { $crate::forward! { @of_entry collapse() -> Option<u64> } };
    (@merge_facts) => {
        $crate::forward! {
            @fn merge_facts(
                into_level: ::spte_core::format::Level, into: u64, from_level: ::spte_core::format::Level, from: u64
            ) -> u64
        }
    };
    (@set_shift) => { $crate::forward! { @fn set_shift(level: ::spte_core::format::Level) -> u8 } };
    (@in_set) => { $crate::forward! { @of_entry in_set() -> bool } };
    (@set_member) => { $crate::forward! { @of_entry set_member(index: usize) -> Option<u64> } };
    (@unmarked) => { $crate::forward! { @of_entry unmarked() -> u64 } };
    (@transition) => { $crate::forward! { @of_entry transition(new: u64) -> ::spte_core::format::Transition } };
    (@equal_contents_transition) => {
        $crate::forward! { @of_entry equal_contents_transition(new: u64) -> ::spte_core::format::Transition }
    };
    (@flushes_before_refill) => { $crate::forward! { @fn flushes_before_refill() -> bool } };
    (@late_facts) => { $crate::forward! { @fn late_facts() -> bool } };
    (@check) => { $crate::forward! { @of_entry check() -> Result<(), ::spte_core::format::EntryError> } };
    (@memory_of) => { $crate::forward! { @fn memory_of(raw: u64) -> u64 } };
    (@raw_of) => { $crate::forward! { @fn raw_of(memory: u64) -> u64 } };
    // What an entry of a level is, or becomes.
    (@of_entry $method:ident($($name:ident: $type:ty)?) -> $result:ty) => {
        $crate::forward! { @fn $method(level: ::spte_core::format::Level, raw: u64 $(, $name: $type)?) -> $result }
    };
    (@fn $method:ident($($name:ident: $type:ty),*) -> $result:ty) => {
        fn $method(&self, $($name: $type),*) -> $result {
            ::spte_core::format::Format::$method(&self.0, $($name),*)
        }
    };
    ($($method:ident)+) => {
        $($crate::forward! { @$method })+
    };
}
