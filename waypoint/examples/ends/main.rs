//! Both ends of what `bench/waypoint` measures, where wrk, h2load and nginx are not enough: clients and servers with a
//! certificate of their own, plain (mutual TLS) or in tunnels (HBONE), and tokens of which no two are the same.
//!
//! ```text
//! ends load  closed loop over some connections; each answer is looked at; prints one line of JSON
//! ends hold  opens connections, asks once on each, and keeps them until its input ends
//! ends first asks until there is an answer, and prints when that was
//! ends serve answers each request with 1 KB
//! ends tokens writes tokens, a line each
//! ```
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing
)]

mod carry;
mod load;
mod serve;
mod tokens;

use clap::{Parser, Subcommand};

#[derive(Parser)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Sends requests, the next one when the answer is there
    Load {
        #[command(flatten)]
        way: carry::Way,
        #[command(flatten)]
        asked: load::Asked,
    },
    /// Keeps connections that have been in use
    Hold {
        #[command(flatten)]
        way: carry::Way,
        #[command(flatten)]
        asked: load::Asked,
    },
    /// Waits for the first answer
    First {
        #[command(flatten)]
        way: carry::Way,
        #[command(flatten)]
        asked: load::Asked,
    },
    /// Answers
    Serve(serve::Served),
    /// Signs tokens
    Tokens(tokens::Wanted),
}

fn main() -> std::io::Result<()> {
    let flags = Flags::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match flags.command {
            Command::Load { way, asked } => load::load(way.open_with()?, asked).await,
            Command::Hold { way, asked } => load::hold(way.open_with()?, asked).await,
            Command::First { way, asked } => load::first(way.open_with()?, asked).await,
            Command::Serve(served) => serve::serve(served).await,
            Command::Tokens(wanted) => tokens::write(&wanted),
        }
    })
}
