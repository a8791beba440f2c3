// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A page, mapped, written, repointed and zapped.

use std::sync::Arc;

use notifier_core::{
    Access, AddrRange, Change, Extent, Gpa, GpaRange, Hva, Outcome, OutputAddr, SlotFlags, SlotSpec, Space,
};
use spte_core::{HeapPages, MapOptions, Miss, Table};
use spte_x86::{Ept, EptOptions};

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

#[test]
fn a_page_is_mapped_written_repointed_and_zapped() {
    let space = Space::builder().private_reclaim().build();
    let pages = Arc::new(HeapPages::new());
    let table = Table::new(&space, Ept::new(EptOptions::default()).unwrap(), Arc::clone(&pages), ()).unwrap();
    let subscription = space.subscribe(Arc::clone(&table)).unwrap();
    space
        .add_slot(SlotSpec { guest: range(0, 1 << 30), host: Some(Hva::new(1 << 40)), flags: SlotFlags::empty() })
        .unwrap();

    let mut walker = space.walker();
    let map = |walker: &mut notifier_core::Walker, at: GpaRange, output: u64, access| {
        let fault = walker.fault(at).unwrap();
        fault
            .resolve(|fault| Ok::<_, ()>(Extent { guest: fault.range(), output: OutputAddr::new(output), access }))
            .unwrap()
            .install(|admission| table.map(admission, &MapOptions::default()))
            .unwrap()
    };
    let mapped = map(&mut walker, range(0x20_0000, 0x40_3000), 0x1020_0000, Access::RWX);
    assert_eq!((mapped.made, mapped.raised), (2 + 3, 0));
    {
        let scope = walker.enter();
        let found = table.translate(&scope, Gpa::new(0x20_1234), Access::WRITE).unwrap();
        assert_eq!((found.output(), found.leaf().len()), (OutputAddr::new(0x1020_1234), 0x20_0000));
        assert!(matches!(table.translate(&scope, Gpa::new(0x60_3000), Access::READ), Err(Miss::Absent { .. })));
    }
    table.check().unwrap();

    let guard = space.retain(AddrRange::with_len(Hva::new((1 << 40) + 0x20_1000), 0x1000).unwrap()).unwrap();
    {
        let scope = walker.enter();
        let written = table.translate(&scope, Gpa::new(0x20_1000), Access::WRITE);
        assert!(matches!(written, Err(Miss::Denied { armed: false, .. })), "{written:?}");
    }
    let change = Change {
        page: Hva::new((1 << 40) + 0x20_1000),
        expected: OutputAddr::new(0x1020_1000),
        new: OutputAddr::new(0xabcd_e000),
    };
    assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Changed);
    guard.close().unwrap();
    table.check().unwrap();
    {
        let scope = walker.enter();
        let found = table.translate(&scope, Gpa::new(0x20_1008), Access::READ).unwrap();
        assert_eq!(found.output(), OutputAddr::new(0xabcd_e008));
        let neighbour = table.translate(&scope, Gpa::new(0x20_2008), Access::READ).unwrap();
        assert_eq!(neighbour.output(), OutputAddr::new(0x1020_2008));
    }
    space.zap(range(0, 1 << 30)).unwrap().close().unwrap();
    assert_eq!(table.stats().leaves.iter().sum::<u64>(), 0);
    // The root and the table of 1G entries, which spans more than was zapped.
    assert_eq!(table.stats().tables, 2);
    drop(walker);
    drop(subscription);
    drop((table, space));
    assert_eq!(pages.live(), 0);
}
