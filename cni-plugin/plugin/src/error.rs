//! Errors in the form of the CNI specification, section 5 ("Error").

use serde_json::json;

/// The codes of the specification that are used here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    /// The configuration asks for a version of the specification that is not spoken.
    IncompatibleVersion,
    /// An environment variable is missing or wrong.
    Environment,
    /// Input could not be read.
    Io,
    /// Input is not what it should be.
    Decode,
    /// The network configuration is invalid.
    InvalidNetwork,
    /// It may work later.
    TryAgainLater,
    /// STATUS: no pods can be added now.
    NotAvailable,
    /// What the agent said.
    Other(u32),
}

impl Code {
    /// The number.
    pub fn number(self) -> u32 {
        match self {
            Self::IncompatibleVersion => 1,
            Self::Environment => 4,
            Self::Io => 5,
            Self::Decode => 6,
            Self::InvalidNetwork => 7,
            Self::TryAgainLater => 11,
            Self::NotAvailable => 50,
            Self::Other(number) => number,
        }
    }
}

/// An error for the container runtime.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CniError {
    code: Code,
    message: String,
    details: String,
}

impl CniError {
    /// An error; the kubelet shows `message` to users.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: String::new() }
    }

    /// With more for those who look closer.
    pub fn details(self, details: impl Into<String>) -> Self {
        Self { details: details.into(), ..self }
    }

    /// As it is printed; `version` is that of the configuration, if it could be read.
    pub fn to_json(&self, version: Option<&str>) -> String {
        let mut error = json!({
            "cniVersion": version.unwrap_or(crate::network::NEWEST),
            "code": self.code.number(),
            "msg": self.message,
        });
        if let (Some(error), false) = (error.as_object_mut(), self.details.is_empty()) {
            error.insert("details".to_owned(), self.details.clone().into());
        }
        format!("{error}\n")
    }
}
