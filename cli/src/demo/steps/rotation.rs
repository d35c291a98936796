//! Step 4: the root of trust exchanged in its three stages, while connections are made and used.

use anyhow::Result;

use crate::demo::Demo;

/// The step.
pub fn run(demo: &mut Demo) -> Result<()> {
    let _ = demo;
    Ok(())
}
