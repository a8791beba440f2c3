// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is written down is what happens: the README's consoles with their output, and the examples of every help text, as
//! a shell runs them.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// An empty directory that goes with it, with the command in `PATH`.
struct Shell(PathBuf);

impl Shell {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("spte-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn run(&self, line: &str) -> Output {
        let command = Path::new(env!("CARGO_BIN_EXE_spte")).parent().unwrap();
        let path = std::env::join_paths(
            std::iter::once(command.to_path_buf()).chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        );
        Command::new("sh").args(["-c", line]).env("PATH", path.unwrap()).current_dir(&self.0).output().unwrap()
    }
}

impl Drop for Shell {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn text(output: &Output) -> String {
    String::from_utf8([&output.stdout[..], &output.stderr[..]].concat()).unwrap()
}

/// Runs the consoles of a page, and compares what they print: how many commands, and of which formats there were scripts.
fn consoles(shell: &Shell, page: &str) -> (usize, Vec<String>) {
    let mut formats = Vec::new();
    let mut ran = 0;
    for block in page.split("```console\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for command in block.split("$ ").skip(1) {
            let (line, expected) = command.split_once('\n').unwrap();
            if line.starts_with("cargo ") {
                continue;
            }
            if let Some((_, format)) = line.split_once("spte run --format ") {
                formats.push(format.into());
            }
            assert_eq!(text(&shell.run(line)), expected, "{line}");
            ran += 1;
        }
    }
    (ran, formats)
}

#[test]
fn the_readme_shows_what_is_printed() {
    let shell = Shell::new("readme");
    let (ran, formats) = consoles(&shell, include_str!("../README.md"));
    assert_eq!(
        formats,
        ["ept", "npt", "x86-64", "x86-64-la57", "arm64-s2", "ppc-radix --granule 64k", "mips64"],
        "one script a format"
    );
    assert_eq!(ran, 13);
}

#[test]
fn the_workspaces_readme_shows_what_is_printed() {
    let shell = Shell::new("workspace");
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    let (ran, formats) = consoles(&shell, &page);
    let expected = ["ept", "npt", "x86-64", "x86-64-la57", "arm64-s2 --granule 16k", "ppc-radix", "mips64"];
    assert_eq!(formats, expected, "one script a format");
    assert_eq!(ran, 7);
}

#[test]
fn examples_of_help_can_be_pasted() {
    let shell = Shell::new("help");
    let mut counts = Vec::new();
    for words in
        [&["--help"][..], &["decode", "--help"], &["run", "--help"], &["dump", "--help"], &["help", "completions"]]
    {
        let (status, help, err) = common::spte(words, b"");
        assert_eq!((status, err.as_str()), (0, ""));
        let examples: Vec<&str> = help.lines().filter_map(|line| line.strip_prefix("  $ ")).collect();
        for line in &examples {
            let output = shell.run(line);
            assert!(output.status.success(), "{line}: {}", text(&output));
            let silent = line.contains(" >") || line.contains("spte.bash");
            assert!(silent || !output.stdout.is_empty(), "{line} prints nothing");
        }
        counts.push(examples.len());
    }
    assert_eq!(counts, [4, 7, 4, 5, 2]);
}

#[test]
fn the_binary_returns_the_status_and_keeps_earlier_output_first() {
    let shell = Shell::new("status");
    let output = shell.run("printf 'map 0 0 4k r\\nmap 0 0 0 r\\n' | spte run --format npt 2>&1; echo $?");
    assert_eq!(text(&output), "ok\nline 2: the size is 0\n2\n");
    // Whoever stops reading is not told of it.
    let output = shell.run("printf 'map 0 0 64m r\\ndump\\n' | spte run --format npt | head -n 1");
    assert_eq!(text(&output), "ok\n");
}

#[test]
fn completions_know_every_command_and_format() {
    for name in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let (status, script, err) = common::spte(&["completions", name], b"");
        assert_eq!((status, err.as_str()), (0, ""));
        for word in ["decode", "dump", "completions", "x86-64-la57", "hw-ad"] {
            assert!(script.contains(word), "{name} does not know {word}");
        }
    }
    assert_eq!(common::spte(&["completions", "csh"], b"").0, 2);
}
