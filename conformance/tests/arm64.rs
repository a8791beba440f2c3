// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! arm64 stage 2 on QEMU.
use conformance::emulator::Tools;
use conformance::machines::arm64::{Arm64, variants};
use conformance::mmu::Mmu;
use conformance::sequence::Sequences;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

#[test]
fn soak() {
    let tools = Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into));
    for variant in variants() {
        let machine = match Arm64::start(&tools, variant) {
            Ok(m) => m,
            Err(e) => {
                println!("{}: {e}", variant.name);
                continue;
            }
        };
        let mmu = Mmu::new(machine);
        let s = Sequences::new(mmu.clone());
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let t = std::time::Instant::now();
        for case in 0..20 {
            if let Err(d) = s.case(&mut rng) {
                println!("{} case {case}:\n{d}", variant.name);
                break;
            }
        }
        println!("{} {:?} {:?}", variant.name, mmu.counts(), t.elapsed());
    }
}

#[test]
fn changes() {
    use conformance::change::{How, seen};
    let tools = Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into));
    for variant in variants() {
        let machine = match Arm64::start(&tools, variant) {
            Ok(m) => m,
            Err(e) => {
                println!("{}: {e}", variant.name);
                continue;
            }
        };
        let mmu = Mmu::new(machine);
        for how in [How::Change, How::Zap] {
            let t = std::time::Instant::now();
            match seen(&mmu, how) {
                Ok(s) => println!("{} {how:?} {s:?} {:?}", variant.name, t.elapsed()),
                Err(e) => println!("{} {how:?} {e}", variant.name),
            }
        }
    }
}

#[test]
fn entries() {
    let tools = Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into));
    for variant in variants() {
        let machine = match Arm64::start(&tools, variant) {
            Ok(m) => m,
            Err(e) => {
                println!("{}: {e}", variant.name);
                continue;
            }
        };
        let mmu = Mmu::new(machine);
        let t = std::time::Instant::now();
        match conformance::entries::check(&mmu, 20, &mut ChaCha8Rng::seed_from_u64(3)) {
            Ok(s) => println!("{} {s:?} {:?}", variant.name, t.elapsed()),
            Err(e) => println!("{} {e}", variant.name),
        }
    }
}

#[test]
fn facts() {
    let tools = Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into));
    for variant in variants() {
        let machine = match Arm64::start(&tools, variant) {
            Ok(m) => m,
            Err(e) => {
                println!("{}: {e}", variant.name);
                continue;
            }
        };
        let mmu = Mmu::new(machine);
        let t = std::time::Instant::now();
        match conformance::facts::race(&mmu, 300, &mut ChaCha8Rng::seed_from_u64(5)) {
            Ok(s) => println!("{} {s:?} {:?}", variant.name, t.elapsed()),
            Err(e) => println!("{} {e}", variant.name),
        }
    }
}

#[test]
fn plants() {
    use conformance::plants::{Plant, is_caught, sequences_miss_flushes};
    let tools = Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into));
    for variant in variants() {
        let machine = match Arm64::start(&tools, variant) {
            Ok(m) => m,
            Err(e) => {
                println!("{}: {e}", variant.name);
                continue;
            }
        };
        let mmu = Mmu::new(machine);
        for plant in Plant::ALL {
            println!("{} {plant:?} {:?}", variant.name, is_caught(&mmu, plant).map_err(|e| e.to_string()));
        }
        println!("{:?}", sequences_miss_flushes(&mmu, 50, &mut ChaCha8Rng::seed_from_u64(5)));
    }
}
