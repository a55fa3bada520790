//! What a hub calls a model.

use std::fmt;

/// Characters of an organisation's or a repository's name.
const MAX_CHARS: usize = 96;

/// `ORG/NAME`, `ORG/NAME@REVISION`, or one file of it, `ORG/NAME/FILE.gguf`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct HubName {
    /// `ORG/NAME`.
    pub(super) repository: String,
    /// A branch, tag or commit.
    pub(super) revision: String,
    /// A GGUF file; none: the directory.
    pub(super) file: Option<String>,
}

impl HubName {
    /// `None` for what can be no such name, as most paths.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (organisation, rest) = text.split_once('/')?;
        let (name, file) = rest
            .split_once('/')
            .map_or((rest, None), |(name, file)| (name, Some(file)));
        let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
        let named = |part: &str| is_part(part) && part.len() <= MAX_CHARS && !part.contains("--");
        if !named(organisation) || !named(name) || !is_part(revision) {
            return None;
        }
        let is_gguf = |file: &str| file.len() > ".gguf".len() && file.ends_with(".gguf");
        match file {
            Some(file) if !is_gguf(file) || !file.split('/').all(is_part) => return None,
            // A file that is not there.
            None if is_gguf(name) => return None,
            _ => {}
        }
        Some(Self {
            repository: format!("{organisation}/{name}"),
            revision: revision.to_owned(),
            file: file.map(str::to_owned),
        })
    }
}

/// Letters, digits, `_`, `-` and `.`; neither hidden nor a way up.
pub(super) fn is_part(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    !text.is_empty() && text.bytes().all(plain) && !text.starts_with(['.', '-']) && !text.contains("..")
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, "/{file}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        for (text, expected) in [
            ("org/name", ("org/name", "main", None)),
            (
                "Qwen/Qwen2.5-0.5B-Instruct",
                ("Qwen/Qwen2.5-0.5B-Instruct", "main", None),
            ),
            ("org/name@v1.0", ("org/name", "v1.0", None)),
            ("org/name/m.gguf", ("org/name", "main", Some("m.gguf"))),
            ("org/name@ab12/sub/m.gguf", ("org/name", "ab12", Some("sub/m.gguf"))),
        ] {
            let name = HubName::parse(text).unwrap_or_else(|| panic!("{text}"));
            let found = (name.repository.as_str(), name.revision.as_str(), name.file.as_deref());
            assert_eq!(found, expected);
            assert_eq!(name.to_string(), text);
        }
        for text in [
            "",
            "name",
            "/name",
            "org/",
            "./name",
            "../name",
            "org/..",
            "/models/x",
            "models/x.gguf",
            "org/name/config.json",
            "org/name/.gguf",
            "org/name/../m.gguf",
            "org/name//m.gguf",
            "org/name@",
            "org/name@a..b",
            "a--b/c",
            "org/na me",
            "org/n\u{e9}",
            "-org/name",
            "org/name/",
            "https://host/org/name",
        ] {
            assert_eq!(HubName::parse(text), None, "{text}");
        }
    }
}
