//! `culvert ca`: the certificate authority of a mesh in file mode, and the exchange of its root in stages.
//!
//! The stages are `identity::rotation`'s: trust both, sign with the new, drop the old. ztunnels follow the directory
//! by themselves; between two stages all of them must have done so, which `status` of the nodes shows
//! (`culvert ztunnel-config certificate`) and time ensures.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use identity::rotation::{self, Consent, NewSigner, Pace, RotationStatus, Stage};
use identity::{CaDirectory, Clock, Timestamp, Validity};
use model::{TrustDomain, TrustDomains};

use crate::table::print;

/// The certificate authority of file mode: what it holds, and the exchange of its root in three stages
#[derive(Args, Debug)]
pub struct CaArgs {
    #[command(subcommand)]
    action: Action,
    /// The directory of the CA, as ztunnel's --ca-dir
    #[arg(long, value_name = "DIR", env = "CULVERT_CA_DIR")]
    ca_dir: PathBuf,
    /// The mesh's trust domain
    #[arg(long, default_value = "cluster.local")]
    trust_domain: TrustDomain,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// Says which root signs, and how far an exchange is
    Status,
    /// Stage 1: makes a new root; both are trusted, the old one signs
    TrustBoth,
    /// Stage 2: the new one signs, both are trusted; workloads get new certificates
    SignWithNew(Gate),
    /// Stage 3: the old one is no longer trusted
    DropOld(Gate),
    /// Takes stage 1 back
    Abandon,
}

#[derive(Args, Clone, Copy, Debug)]
struct Gate {
    /// All nodes are ready for this stage, I looked: do it before the time that ensures it is over
    #[arg(long)]
    acknowledge: bool,
}

impl Gate {
    fn consent(self) -> Consent {
        if self.acknowledge { Consent::Acknowledged } else { Consent::WhenDue }
    }
}

/// Runs the command.
pub fn run(args: &CaArgs) -> Result<ExitCode> {
    let ca = CaDirectory::open(&args.ca_dir)
        .with_context(|| format!("no CA in {}: name its directory with --ca-dir", args.ca_dir.display()))?;
    let domains = TrustDomains::only(args.trust_domain.clone());
    let now = Clock::system().now();
    let status = match &args.action {
        Action::Status => rotation::status(&ca)?,
        Action::TrustBoth => {
            let new = NewSigner::Made(Validity::of_roots());
            rotation::trust_both(&ca, &new, Pace::default(), &domains, now)?
        }
        Action::SignWithNew(gate) => rotation::sign_with_new(&ca, gate.consent(), &domains, now)?,
        Action::DropOld(gate) => rotation::drop_old(&ca, gate.consent(), &domains, now)?,
        Action::Abandon => rotation::abandon(&ca, &domains, now)?,
    };
    let loaded = ca.load(&domains, now)?;
    let root = loaded.authority.root().to_string();
    let until = Timestamp(loaded.authority.not_after());
    let mut text = format!("signs     root {} (until {until})\n", short(&root));
    text.push_str(&format!("trusted   {} root{}\n", loaded.roots.len(), plural(loaded.roots.len())));
    text.push_str(&describe(&status));
    for warning in &loaded.warnings {
        text.push_str(&format!("note      {warning}\n"));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn describe(status: &RotationStatus) -> String {
    let (stage, next) = match status.stage {
        Stage::Settled => return "exchange  none under way\n".to_owned(),
        Stage::BothTrusted => ("the new root is trusted beside the old one", "sign-with-new"),
        Stage::NewSigns => ("the new root signs, both are trusted", "drop-old"),
    };
    let due = status.next_due.map(Timestamp);
    let due = due.map(|d| format!(", by itself at {d}, before that with --acknowledge")).unwrap_or_default();
    let new = status.new_root.map(|r| short(&r.to_string())).unwrap_or_default();
    format!("exchange  {stage} (new root {new})\nnext      culvert ca {next}{due}\n")
}

/// Enough to tell two roots apart.
fn short(id: &str) -> String {
    id.chars().take(12).collect()
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}
