//! What clients call a model.

use std::path::Path;

use crate::Gguf;

/// The name under which a model file is served, e.g. `SmolLM2-135M-Instruct` for `SmolLM2-135M-Instruct.Q4_1.gguf`: the file's name without its
/// extension and without the storage type at its end. Metadata is the fallback only: converters fill `general.name` with whatever the training run was called.
pub fn model_name(gguf: &Gguf, path: &Path) -> String {
    let file = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let stem = without_extension(&file);
    let name = match stem.rfind(['.', '-']) {
        Some(at) if at > 0 && is_storage_type(&stem[at + 1..]) => &stem[..at],
        _ => stem,
    };
    if !name.is_empty() {
        return name.to_owned();
    }
    gguf.string("general.name")
        .ok()
        .filter(|name| !name.is_empty())
        .unwrap_or("model")
        .to_owned()
}

/// The name under which a directory of a model's files is served: `ORG/NAME` in the cache of Hugging Face's hub
/// (`models--ORG--NAME/snapshots/COMMIT`), elsewhere the directory's own, also where the path ends in `.`.
pub fn directory_name(path: &Path) -> String {
    let named = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned());
    let whole = path.canonicalize();
    let repository = whole.as_deref().ok().and_then(|path| {
        let snapshots = path.parent()?;
        let repository = named(snapshots.parent()?)?;
        let name = repository.strip_prefix("models--")?.replace("--", "/");
        (named(snapshots)? == "snapshots").then_some(name)
    });
    repository
        .or_else(|| named(path))
        .or_else(|| whole.ok().as_deref().and_then(named))
        .unwrap_or_else(|| "model".to_owned())
}

fn without_extension(file: &str) -> &str {
    let end = file.len().saturating_sub(".gguf".len());
    match file.get(end..) {
        Some(extension) if extension.eq_ignore_ascii_case(".gguf") => &file[..end],
        _ => file,
    }
}

/// `F16`, `BF16`, `F32`, or a `Q` or `IQ` type such as `Q4_1`, `q4_k_m`, `IQ2_XXS`.
fn is_storage_type(text: &str) -> bool {
    let text = text.to_ascii_uppercase();
    if ["F16", "BF16", "F32"].contains(&text.as_str()) {
        return true;
    }
    let digits = text.strip_prefix("IQ").or_else(|| text.strip_prefix('Q'));
    digits.is_some_and(|rest| {
        let mut parts = rest.split('_');
        let bits = parts.next().unwrap_or_default();
        (1..=2).contains(&bits.len())
            && bits.bytes().all(|byte| byte.is_ascii_digit())
            && parts.all(|part| ["0", "1", "K", "S", "M", "L", "XS", "XXS", "NL", "XL"].contains(&part))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::GgufWriter;

    #[test]
    fn names_come_from_files() {
        let gguf = Gguf::from_bytes(GgufWriter::new().string("general.name", "Run 7").finish()).unwrap();
        for (path, name) in [
            ("/models/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("Llama-3.1-8B-Instruct-Q4_K_M.gguf", "Llama-3.1-8B-Instruct"),
            ("qwen.IQ2_XXS.GGUF", "qwen"),
            ("tiny-f16.gguf", "tiny"),
            ("Model-7B.gguf", "Model-7B"),
            ("Mixtral-Q.gguf", "Mixtral-Q"),
            ("plain", "plain"),
            ("Q8_0.gguf", "Q8_0"),
            ("é.gguf", "é"),
            ("/", "Run 7"),
            (".gguf", "Run 7"),
        ] {
            assert_eq!(model_name(&gguf, Path::new(path)), name, "{path}");
        }
    }

    #[test]
    fn directories_have_names() {
        let root = tempfile::tempdir().unwrap();
        let snapshot = root.path().join("models--org--Model-1B/snapshots/0123abcd");
        for (path, name) in [
            (root.path().join("Tiny"), "Tiny"),
            (root.path().join("Tiny/."), "Tiny"),
            (snapshot.join(".."), "snapshots"),
            (snapshot.clone(), "org/Model-1B"),
            (snapshot.join("sub"), "sub"),
        ] {
            std::fs::create_dir_all(&path).unwrap();
            assert_eq!(directory_name(&path), name, "{}", path.display());
        }
        assert_eq!(directory_name(Path::new("/")), "model");
        assert_eq!(directory_name(Path::new("not/there")), "there");
    }
}
