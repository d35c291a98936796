//! `nodeLocal`: whether connections whose two ends are on one node are encrypted.
//!
//! It is a field of the mesh's settings, `nodeLocal: direct`, and for the workloads of a namespace its annotation
//! `culvert.dev/node-local: direct`, which goes before the mesh's. A connection goes as it is only where both of its
//! namespaces say so; nothing else, and STRICT least of all, implies it. `kernel` says `direct`, and that the proxy need
//! not be on the path.

use model::NodeLocal;

use crate::diagnostic::Code;
use crate::fields::{Cursor, Fields};
use crate::metadata::Metadata;

const NAMESPACE: &str = "culvert.dev/node-local";
const REMEDY: &str = "write encrypted, direct or kernel";

/// What the mesh's settings say.
pub(super) fn field(mut cursor: Cursor<'_, '_>) -> Option<NodeLocal> {
    if let Some(text) = cursor.node().as_str()
        && text.parse::<NodeLocal>().is_err()
    {
        cursor.invalid(format_args!("{text:?} is no way to carry connections"), REMEDY);
        return None;
    }
    cursor.string()?.parse().ok()
}

/// What a namespace says of its workloads. What can't be read is `encrypted`, and no error: the namespace would stay as it
/// was before, and of one that was never read the mesh's word would hold, which may be `direct`.
pub fn annotation(fields: &mut Fields<'_, '_>, metadata: &Metadata<'_>) -> Option<NodeLocal> {
    let annotation = metadata.annotation(NAMESPACE)?;
    let mode = annotation.value.parse().unwrap_or_else(|_| {
        let message = "none of \"encrypted\", \"direct\" and \"kernel\", and taken as \"encrypted\"";
        annotation.report(fields, Code::ActsOtherwise, message, REMEDY);
        NodeLocal::Encrypted
    });
    Some(mode)
}
