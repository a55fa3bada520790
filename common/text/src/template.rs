//! Chat templates: messages to prompt segments.
//!
//! What clients write must not become special tokens. So a chat is rendered twice: with the contents, and with a marker in place of each. If filling the
//! contents into the second gives the first, it is known which characters are the template's and which a client's; only the template's are searched
//! for special tokens. If not, the template changes contents; then the prompt may only have the special tokens that the markers' rendering has, in order.

use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, context, syntax::SyntaxConfig, value::Value,
};

use crate::{
    Segment, TextError, Tokenizer,
    limits::{MAX_MESSAGES, MAX_RENDERED_BYTES, MAX_ROLE_CHARS, TEMPLATE_FUEL},
    segment::push_plain,
    strftime::strftime,
};

const NAME: &str = "chat";

/// Around a message's index, in place of its content: private-use characters, which no template has.
const MARKER: (char, char) = ('\u{e0f1}', '\u{e0f2}');

/// What templates do to contents as a whole; tried in this order.
const CHANGES: [fn(&str) -> &str; 4] = [|content| content, str::trim, str::trim_end, str::trim_start];

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`: a word; the template decides which it knows.
    pub role: String,
    /// Ordinary text, whatever it looks like.
    pub content: String,
}

/// A chat as the model's template spells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderedChat {
    /// The whole prompt as text.
    pub text: String,
    /// The same, in segments for [`Tokenizer::encode_segments`]; no two plain ones touch.
    pub segments: Vec<Segment>,
}

/// A model's chat template: Jinja as Hugging Face's transformers runs it.
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Parses a template.
    pub fn new(source: &str) -> Result<Self, TextError> {
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| TextError::BrokenTemplate(describe(&error)))?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.add_function("raise_exception", |message: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| TextError::BrokenTemplate(describe(&error)))?;
        Ok(ChatTemplate { environment })
    }

    /// Spells messages as a prompt; with `add_generation_prompt`, up to where the assistant's answer starts.
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<RenderedChat, TextError> {
        check_messages(messages)?;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        let markers: Vec<String> = (0..messages.len())
            .map(|index| format!("{}{index}{}", MARKER.0, MARKER.1))
            .collect();
        let markers: Vec<&str> = markers.iter().map(String::as_str).collect();
        let rendering = Rendering {
            template: self,
            tokenizer,
            messages,
            add_generation_prompt,
            now,
        };
        let text = rendering.run(&contents)?;
        let segments = match rendering.run(&markers) {
            Ok(marked) => segments(tokenizer, &text, &marked, &contents)?,
            // The template refuses markers, so it looks into contents: nothing is known about its text.
            Err(_) => segments(tokenizer, &text, "", &contents)?,
        };
        Ok(RenderedChat { text, segments })
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").finish_non_exhaustive()
    }
}

fn check_messages(messages: &[ChatMessage]) -> Result<(), TextError> {
    if messages.is_empty() {
        return Err(TextError::NoMessages);
    }
    if messages.len() > MAX_MESSAGES {
        return Err(TextError::RenderTooLarge("too many messages"));
    }
    let bytes = messages
        .iter()
        .map(|message| message.content.len())
        .fold(0, usize::saturating_add);
    if bytes > MAX_RENDERED_BYTES {
        return Err(TextError::RenderTooLarge("too many bytes of content"));
    }
    let is_word = |role: &str| {
        (1..=MAX_ROLE_CHARS).contains(&role.len())
            && role
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
    };
    match messages.iter().find(|message| !is_word(&message.role)) {
        Some(message) => Err(TextError::Role(message.role.chars().take(MAX_ROLE_CHARS).collect())),
        None => Ok(()),
    }
}

/// One chat, to be rendered with different contents.
struct Rendering<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    messages: &'a [ChatMessage],
    add_generation_prompt: bool,
    now: u64,
}

impl Rendering<'_> {
    fn run(&self, contents: &[&str]) -> Result<String, TextError> {
        let now = self.now;
        let strftime_now = Value::from_function(move |format: String| {
            strftime(&format, now)
                .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "this date format is not supported"))
        });
        let messages = self.messages.iter().zip(contents);
        let messages: Vec<Value> = messages
            .map(|(message, content)| context! { role => message.role.as_str(), content => *content })
            .collect();
        let special = |id: Option<u32>| id.map(|id| self.tokenizer.token_text(id));
        let context = context! {
            messages => messages,
            add_generation_prompt => self.add_generation_prompt,
            bos_token => special(self.tokenizer.bos()),
            eos_token => special(self.tokenizer.eos()),
            pad_token => special(self.tokenizer.pad()),
            strftime_now => strftime_now,
        };
        let mut out = BoundedText::default();
        let result = self
            .template
            .environment
            .get_template(NAME)
            .and_then(|template| template.render_captured_to(context, &mut out).map(drop));
        match result {
            _ if out.full => Err(TextError::RenderTooLarge("too many bytes")),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => Err(TextError::RenderTooLarge("too much work")),
            Err(error) => Err(TextError::Render(describe(&error))),
            Ok(()) => String::from_utf8(out.bytes).map_err(|error| TextError::Render(error.to_string())),
        }
    }
}

/// The template's own message where it raised one, otherwise what failed and where.
fn describe(error: &Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_owned(),
        _ => error.to_string(),
    }
}

fn segments(tokenizer: &Tokenizer, text: &str, marked: &str, contents: &[&str]) -> Result<Vec<Segment>, TextError> {
    let parts = parts(marked);
    let mut segments = Vec::new();
    if let Some(change) = CHANGES
        .into_iter()
        .find(|change| fills(&parts, text, contents, *change))
    {
        for part in &parts {
            match part {
                Part::Template(own) => tokenizer.push_recognised(own, &mut segments),
                Part::Content(index) => push_plain(&mut segments, change(contents[*index])),
            }
        }
        return Ok(segments);
    }
    // The template changes contents. Its own special tokens are those that it writes around markers.
    let mut own = Vec::new();
    for part in &parts {
        if let Part::Template(text) = part {
            tokenizer.push_recognised(text, &mut own);
        }
    }
    tokenizer.push_recognised(text, &mut segments);
    let special = |segment: &&Segment| matches!(segment, Segment::Special(id) if tokenizer.is_control(*id));
    let same = segments.iter().filter(special).eq(own.iter().filter(special));
    if same {
        Ok(segments)
    } else {
        Err(TextError::SpecialInContent)
    }
}

/// A piece of a rendering with markers.
enum Part<'a> {
    Template(&'a str),
    /// The content of the message with this index.
    Content(usize),
}

fn parts(marked: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let mut rest = marked;
    while let Some((own, after)) = rest.split_once(MARKER.0) {
        parts.push(Part::Template(own));
        match after
            .split_once(MARKER.1)
            .and_then(|(index, after)| Some((index.parse().ok()?, after)))
        {
            Some((index, after)) => {
                parts.push(Part::Content(index));
                rest = after;
            }
            None => rest = after,
        }
    }
    parts.push(Part::Template(rest));
    parts
}

/// Whether the parts, with changed contents filled in, are `text`.
fn fills(parts: &[Part<'_>], text: &str, contents: &[&str], change: fn(&str) -> &str) -> bool {
    let mut rest = text;
    for part in parts {
        let expected = match part {
            Part::Template(own) => own,
            Part::Content(index) => contents.get(*index).map_or("", |content| change(content)),
        };
        match rest.strip_prefix(expected) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    rest.is_empty()
}

/// Collects output up to [`MAX_RENDERED_BYTES`].
#[derive(Default)]
struct BoundedText {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > MAX_RENDERED_BYTES - self.bytes.len() {
            self.full = true;
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the rendered chat is too large",
            ));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
