//! From what is known of a connection to its metric labels.

use process::metrics::tcp::{ConnectionSecurity, Party, Reporter, ServiceLabels, TcpLabels};
use telemetry::{party, service_labels};

use crate::connections::{Carrier, Direction, Story};

/// The labels of the connection that `story` tells of.
pub fn labels(story: &Story) -> TcpLabels {
    TcpLabels {
        reporter: reporter(story.direction),
        source: party(story.source_workload.as_ref(), story.source_identity.as_ref()),
        destination: party(story.destination_workload.as_ref(), story.destination_identity.as_ref()),
        service: service_labels(story.destination_service.as_ref()),
        security: match story.carrier {
            Carrier::Hbone => ConnectionSecurity::MutualTls,
            Carrier::NodeLocal | Carrier::Kernel => ConnectionSecurity::NodeLocal,
            Carrier::Plaintext => ConnectionSecurity::Unknown,
        },
        custom: None,
    }
}

/// The labels of a connection of which nothing is known but its direction.
pub fn unknown_labels(direction: Direction) -> TcpLabels {
    TcpLabels {
        reporter: reporter(direction),
        source: Party::unknown(),
        destination: Party::unknown(),
        service: ServiceLabels::default(),
        security: ConnectionSecurity::Unknown,
        custom: None,
    }
}

fn reporter(direction: Direction) -> Reporter {
    match direction {
        Direction::Outbound => Reporter::Source,
        Direction::Inbound => Reporter::Destination,
    }
}
