// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writes the seeds of `corpus/` that were thought of rather than found: `cargo run --example seeds`, in this directory.
//!
//! Files are named `seed-...`; other files of a corpus are what fuzzing found and `cargo fuzz cmin` kept.

use std::{fs, path::Path};

use secondary_mmu_fuzz::bytes::noise;
use spte_model::{Op, Shape, parse_script};

/// A valid input of each format: selector and options, then entries at their levels.
fn decode() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut add = |head: &[u8], entries: &[(u8, u64)]| {
        let mut bytes = head.to_vec();
        for (level, raw) in entries {
            bytes.push(level - 1);
            bytes.extend(raw.to_le_bytes());
        }
        all.push(bytes);
    };
    // EPT: levels, physical bits (22 is 52), execute-only, accessed/dirty, mode-based execute, suppress-#VE, 2M, 1G, no
    // executable huge pages, cache bits. As Linux writes them, and as operations of the format leave them.
    let entries = [
        (1, 0x8600_0000_0501_0b77),
        (1, 0x8400_0000_0501_0975),
        (1, 0x8000_0000_0501_0975),
        (2, 0x8600_0000_4020_0bf7),
        (3, 0x8600_0000_4000_0bf3),
        (2, 0x8000_0000_0123_4907),
        (4, 0x8000_0000_0123_4907),
        (1, 0x8000_0000_0000_0000),
        (1, 0xd540_0000_0000_0000),
        (1, 0x0000_0000_0000_5002),
        (2, 0x8600_0000_0000_0001),
    ];
    add(&[0, 0, 22, 1, 0, 0, 1, 1, 1, 0, 0], &entries);
    add(&[0, 1, 16, 0, 0, 0, 1, 1, 0, 0, 44], &entries);
    // Dirty by being writable, in bits 53:52; tracked leaves have their rights in 54 and 56.
    let typed = |kind: u64| entries.map(|(level, raw)| (level, raw | kind << 52));
    add(&[0, 0, 22, 1, 1, 0, 1, 1, 1, 0, 0], &typed(1));
    add(
        &[0, 0, 22, 1, 1, 0, 1, 1, 1, 0, 0],
        &[(1, 0x8750_0000_0501_0870), (1, 0x8e50_0000_0501_0870), (2, 0x8150_0000_4020_08f0)],
    );
    add(&[0, 0, 22, 1, 2, 0, 1, 1, 1, 0, 0], &typed(2));
    add(&[0, 0, 22, 1, 0, 1, 1, 1, 1, 0, 0], &entries.map(|(level, raw)| (level, raw | 0x400)));
    add(
        &[0, 0, 22, 1, 0, 0, 1, 1, 1, 1, 0],
        &[(2, 0xc600_0000_4020_0bf3), (1, 0x8600_0000_0501_0b77), (3, 0x8600_0000_4000_0bf3)],
    );
    // Long mode and NPT: levels, physical bits, 1G, NX, keys, encryption bit, encrypted tables, bit 8 of links, no
    // executable huge pages, cache bits.
    let entries = [
        (1, 0x8000_0000_0501_0e67),
        (1, 0x0000_0000_0501_0e67),
        (1, 0x0000_0000_0501_0c25),
        (1, 0x8000_0000_0501_08ad),
        (2, 0x0000_0000_4020_1ee7),
        (3, 0x8000_0000_4000_0ee7),
        (2, 0x0000_0000_0123_4827),
        (4, 0x0000_0000_0123_4827),
        (1, 0x8000_0000_0000_0000),
        (1, 0xaa20_0000_0000_0000),
        (1, 0x0008_0000_0501_0801),
        (2, 0x0000_0000_0000_1081),
    ];
    for selector in [1, 2] {
        add(&[selector, 0, 22, 1, 1, 0, 0, 0, 1, 0, 0], &entries);
        add(&[selector, 1, 16, 1, 1, 1, 47, 1, 0, 0, 0], &entries);
        add(&[selector, 0, 22, 0, 0, 0, 0, 0, 0, 0, 46], &entries);
        add(
            &[selector, 0, 22, 1, 1, 0, 0, 0, 1, 1, 0],
            &[(2, 0x8040_0000_4020_0ee7), (1, 0x0000_0000_0501_0e67), (3, 0x8000_0000_4000_0ee7)],
        );
    }
    // Stage 2: granule, guest bits, physical bits, LPA2, start, FWB, XNX, accessed/dirty, shareability, break level.
    let entries = [
        (1, 0x0100_0000_0501_07ff),
        (1, 0x0000_0000_0501_077f),
        (1, 0x0100_0000_0501_077f),
        (1, 0x0340_0000_0501_077f),
        (2, 0x0100_0000_4020_07fd),
        (3, 0x0100_0000_4000_07fd),
        (2, 0x0000_0000_0501_0003),
        (3, 0x0000_0000_0501_0003),
        (1, 0),
        (1, 0x9540_0000_0000_0000),
        (1, 0x5000_0000_0000_7000),
        (1, 0x0000_0000_0501_0001),
    ];
    add(&[3, 0, 10, 18, 0, 8, 0, 0, 0, 0, 0], &entries);
    add(&[3, 1, 10, 18, 0, 9, 0, 0, 1, 0, 2], &entries);
    add(
        &[3, 2, 18, 18, 0, 8, 0, 1, 0, 0, 0],
        &[
            (1, 0x0100_0000_0501_07ff),
            (2, 0x0100_0000_4000_07fd),
            (2, 0x0000_0000_0501_0003),
            (1, 0x1940_0000_0501_077f),
        ],
    );
    add(&[3, 0, 10, 18, 0, 8, 1, 0, 0, 0, 0], &[(1, 0x0100_0000_0501_07db), (1, 0x0100_0000_0501_07c7)]);
    let dirty = entries.map(|(level, raw)| (level, if raw & 0x80 != 0 { raw | 1 << 51 } else { raw }));
    add(&[3, 0, 10, 18, 0, 8, 0, 0, 2, 0, 0], &dirty);
    add(
        &[3, 0, 22, 22, 1, 8, 0, 0, 2, 0, 2],
        &[(1, 0x0108_0000_0501_04ff), (4, 0x0108_0080_0000_04fd), (3, 0x0000_0000_0501_0003)],
    );
    // Radix: base page, physical bits (23 is 53), strong access order.
    let entries = [
        (1, 0xc000_0000_0501_0987),
        (1, 0xc000_0000_0501_0905),
        (1, 0xc000_0000_0501_0105),
        (1, 0xc000_0000_0501_0526),
        (2, 0xc000_0000_4020_0987),
        (3, 0xc000_0000_4000_0136),
        (2, 0x8000_0000_0501_0009),
        (2, 0x8000_0000_0501_0105),
        (3, 0x8000_0000_0501_0009),
        (4, 0x8000_0000_0501_0009),
        (1, 0x0000_0000_0000_0180),
        (1, 0x1c00_0000_0000_0600),
        (2, 0x0300_0000_0000_0860),
        (4, 0xc000_0000_0000_0105),
        (1, 0xc200_0000_0501_0105),
        (1, 0xc000_0000_0501_0a05),
    ];
    add(&[6, 0, 23, 1], &entries);
    add(&[6, 1, 23, 0], &entries);
    add(&[6, 1, 10, 1], &entries);
    // MIPS: page, width, layout, physical bits (18 is 48), RI and XI, cache attribute of tables, sentinels elsewhere.
    let entries = [
        (1, 0x0000_0000_1234_078f),
        (1, 0x0000_0000_1234_0687),
        (1, 0x0000_0000_1234_060b),
        (1, 0x0000_0000_1234_06b5),
        (2, 0x9800_0000_1234_0000),
        (2, 0x9800_ffff_fff0_0000),
        (2, 0),
        (1, 0),
        (1, 0x9540_0000_0000_0000),
        (1, 0x0000_0000_0007_0000),
        (1, 0x0000_0000_1234_0080),
    ];
    for page in 0..3 {
        add(&[7, page, 0, 0, 18, 1, 3, 0], &entries);
        add(
            &[7, page, 1, 1, 18, 1, 3, 0],
            &entries.map(|(level, raw)| (level, if level == 1 { raw << 1 } else { raw })),
        );
        add(&[7, page, 1, 0, 29, 0, 5, 1, 64], &[(1, 0x1234_07af), (1, 0x1234_06a5), (3, 0xa800_0000_1234_0000)]);
    }
    // The command, on entries and on words.
    for format in 0..7 {
        for json in [0, 32] {
            let mut bytes = vec![4, format, json, 0];
            [0x8600_0000_0501_0b77_u64, 0x0000_0000_4020_1ee7, 0x0100_0000_0501_07ff]
                .iter()
                .for_each(|raw| bytes.extend(raw.to_le_bytes()));
            all.push(bytes);
        }
    }
    all.push(b"\x05\x00\x000x8600000005010b77 00000000050100e7 5 0x".to_vec());
    all.push(b"\x05\x00\x008600000005010b77 0xfFfF".to_vec());
    all
}

/// Scripts with every command, refusals and malformed lines.
const SCRIPTS: &[&str] = &[
    "map 0x200000 0x40000000 2m rwx page=max\nwrprotect 0x200000 2m\nchange 0x201000 0x7000\ntouch 0x202000 w\ntouch 0x201000 w\ndirty 0 1g\nwalk 0x201000\nflushes\n",
    "map 0x10000 0x40000 64k rwx page=max\nage 0 1m\ntouch 0x10000 r\ntouch 0x10000 r\nage 0 1m\nstats\ndump\n",
    "map 0 0x10000000 4m rwx page=2m\ntouch 0x1234 w\ndirty 0 4m\nsplit 0 2m\ncollapse 0 4m\nzapchange 0 0x50000\ndump\n",
    "map 0x10000 0xfee00000 64k rw mem=uc # a device\nmap 0x10000 0 64k r\n\nprotect 0x10000 64k -\nunmap 0 1t\nwalk 5\nflushes\n",
    "map 0x4000 0x8000 16k r mem=wt page=16k\nmap 0x10000 0x10000 64k rx mem=wc page=64k\nprotect 0 1m x\nprotect 0 1m rwx\r\ndump\n",
    "map 0 0x40000000 1g rw page=1g\nprotect 0x200000 2m r\nstats\nprotect 0x200000 2m rw\ncollapse 0 1g\ndump\nflushes\n",
    "map 0x10000 0x10000 64k rw page=4k\nmap 0 0 0 r\n",
    "unmap 0x1001 4k\n",
    "touch 0xffffffffffffffff r\n",
    "map 0x10000 0x20000 128k rw\nwrprotect 0x10000 128k\ntouch 0x10000 w\ndirty 0x10000 64k\ntouch 0x10000 w\nunmap 0x10000 64k\ndirty 0 1m\nwalk 0x10000\n",
    "frobnicate\n",
    "map 0x10000 0x10000 64k rw page=max page=max\n",
];

fn script() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (index, text) in SCRIPTS.iter().enumerate() {
        for format in 0..7_u8 {
            // Arm64, Power and MIPS with each granule.
            let which = if format >= 4 { 2 } else { 0 } | if index % 4 == 3 { 32 } else { 0 } | (index & 1) as u8;
            let mut bytes = vec![format, which];
            bytes.extend([(index / 2 % 3) as u8; 4]);
            bytes.extend(text.as_bytes());
            if (index + usize::from(format)) % 2 == 0 || index < 2 {
                all.push(bytes);
            }
        }
    }
    all
}

/// Operations of the scripts, behind each of a few options.
fn operations(shape: &Shape, options: &[&[u8]]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (index, text) in SCRIPTS.iter().enumerate() {
        let Ok(lines) = parse_script(shape, text) else { continue };
        let ops: Vec<Op> = lines
            .into_iter()
            .filter_map(|(_, command)| match command {
                spte_model::Command::Op(op) => Some(op),
                _ => None,
            })
            .collect();
        let mut bytes = options[index % options.len()].to_vec();
        bytes.extend(Op::encode(&ops));
        all.push(bytes);
    }
    // And what the decoder makes of bytes that look random.
    for n in 0..6 {
        let mut bytes = options[n as usize % options.len()].to_vec();
        bytes.extend(noise(n, 320));
        all.push(bytes);
    }
    all
}

fn main() {
    let stage2: [&[u8]; 6] = [&[0, 0, 8], &[0, 1, 8], &[0, 2, 8], &[1, 0, 16], &[97, 0, 8], &[16, 1, 0]];
    let arm = Shape::new(&[1 << 16, 1 << 29], 40, 48).expect("a shape");
    let power = Shape::ppc_radix(1 << 16).expect("a shape");
    let mips: [&[u8]; 5] = [&[0, 0], &[1, 0], &[3, 1], &[12, 2], &[16, 0]];
    let gpa = Shape::new(&[1 << 16], 40, 48).expect("a shape");
    let mut scarce = Vec::new();
    for (format, options) in
        [(0, &[0][..]), (1, &[0]), (2, &[0]), (3, &[0]), (4, &[0, 0, 8]), (4, &[0, 2, 8]), (5, &[1]), (6, &[1, 0])]
    {
        let shape = match format {
            4 => arm.clone(),
            5 => power.clone(),
            6 => gpa.clone(),
            _ => Shape::ept(),
        };
        for (index, plan) in [[3, 1, 3], [5, 255, 0], [9, 2, 1], [0, 1, 0]].iter().enumerate() {
            let head = [&[format], &plan[..], options].concat();
            let made = operations(&shape, &[&head]);
            scarce.extend(made.into_iter().skip(index).step_by(4));
        }
    }
    let corpora = [
        ("decode", decode()),
        ("script", script()),
        ("protocol", (0..24).map(|n| noise(n, 256 + 16 * n as usize)).collect()),
        ("ept", operations(&Shape::ept(), &[&[0], &[0x40], &[0x80], &[0x2c], &[0x13]])),
        ("npt", operations(&Shape::npt(), &[&[0], &[1], &[6]])),
        ("x86_64", operations(&Shape::x86_64(), &[&[0], &[1], &[6]])),
        ("la57", operations(&Shape::x86_64_la57(), &[&[0], &[1], &[6]])),
        ("arm64_s2", operations(&arm, &stage2)),
        ("ppc_radix", operations(&power, &[&[1], &[0], &[3]])),
        ("mips64", operations(&gpa, &mips)),
        ("out_of_memory", scarce),
    ];
    for (target, seeds) in corpora {
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
        fs::create_dir_all(&place).expect("a directory");
        for (number, bytes) in seeds.iter().enumerate() {
            fs::write(place.join(format!("seed-{number:02}")), bytes).expect("a seed");
        }
        println!("{target}: {} seeds", seeds.len());
    }
}
