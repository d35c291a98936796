//! Compiles the programs with clang. The header that they share with user space is made of `src/layout.rs`.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, io};

const PROGRAMS: [&str; 3] = ["capture", "marks", "verdicts"];

fn main() -> Result<(), String> {
    println!("cargo:rerun-if-changed=programs");
    println!("cargo:rerun-if-changed=src/layout.rs");
    println!("cargo:rerun-if-env-changed=CLANG");
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|error| format!("OUT_DIR: {error}"))?);
    let layout = fs::read_to_string("src/layout.rs").map_err(|error| format!("src/layout.rs: {error}"))?;
    fs::write(out.join("layout.h"), header(&layout)?).map_err(|error| format!("layout.h: {error}"))?;
    PROGRAMS.iter().try_for_each(|name| compile(name, &out))
}

fn compile(name: &str, out: &Path) -> Result<(), String> {
    let clang = env::var("CLANG").unwrap_or_else(|_| "clang".to_owned());
    let mut command = Command::new(&clang);
    // bpfel: every machine that this is built for is little-endian.
    command
        .args(["-target", "bpfel", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-std=gnu11", "-I"])
        .arg(out);
    // The kernel's headers of the machine that builds; asm/types.h is the same on those that we build for.
    for triple in ["x86_64-linux-gnu", "aarch64-linux-gnu"] {
        command.args(["-idirafter", &format!("/usr/include/{triple}")]);
    }
    command.arg("-c").arg(format!("programs/{name}.bpf.c")).arg("-o").arg(out.join(format!("{name}.bpf.o")));
    let output = command.output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("{clang} is not installed, which compiles the eBPF programs; install the package clang")
        }
        _ => format!("cannot run {clang}: {error}"),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let hint =
        if said.contains("file not found") { " (the package linux-libc-dev has the headers)" } else { "" };
    Err(format!("clang can't compile programs/{name}.bpf.c{hint}:\n{said}"))
}

/// The constants and structs of `layout` in C.
fn header(layout: &str) -> Result<String, String> {
    let mut text = "#pragma once\n#include <linux/types.h>\n".to_owned();
    let mut open: Option<&str> = None;
    for line in layout.lines().map(str::trim) {
        let unknown = || format!("src/layout.rs: not understood: {line}");
        if let Some(rest) = line.strip_prefix("pub const ") {
            let (name, value) = rest.split_once('=').ok_or_else(unknown)?;
            let name = name.split(':').next().ok_or_else(unknown)?;
            let _ = writeln!(text, "#define {name} {}", value.trim_end_matches(';').replace('_', ""));
        } else if let Some(rest) = line.strip_prefix("pub struct ") {
            let name = rest.trim_end_matches('{').trim();
            let _ = writeln!(text, "struct {name} {{");
            open = Some(name);
        } else if open.is_some() && line == "}" {
            text.push_str("};\n");
            open = None;
        } else if let (Some(_), Some(rest)) = (open, line.strip_prefix("pub ")) {
            let (name, kind) = rest.trim_end_matches(',').split_once(": ").ok_or_else(unknown)?;
            let _ = writeln!(text, "{};", field(name, kind).ok_or_else(unknown)?);
        } else if let Some(rest) = line.strip_prefix("const _: () = assert!(size_of::<") {
            let (name, rest) = rest.split_once(">() == ").ok_or_else(unknown)?;
            let size = rest.strip_suffix(");").ok_or_else(unknown)?;
            let _ = writeln!(text, "_Static_assert(sizeof(struct {name}) == {size}, \"{name}\");");
        }
    }
    Ok(text)
}

/// A field's declaration in C.
fn field(name: &str, kind: &str) -> Option<String> {
    let plain = |kind: &str| matches!(kind, "u8" | "u16" | "u32" | "u64").then(|| format!("__{kind}"));
    match kind.strip_prefix('[') {
        None => Some(format!("{} {name}", plain(kind)?)),
        Some(array) => {
            // The last length is of the outermost array.
            let (kind, length) = array.strip_suffix(']')?.rsplit_once("; ")?;
            field(&format!("{name}[{length}]"), kind)
        }
    }
}
