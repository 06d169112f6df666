/**
 * Owns turning `messages` into the text that the model was trained on, with the model's chat template.
 *
 * Invariants
 * 1. A model without a usable template still serves prompts; only `messages` is refused, with the reason.
 * 2. The rendered text holds its special tokens already: it is tokenized without adding any.
 */
import { Template } from '@huggingface/jinja';
import type { GenerateRequest } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';

type Messages = NonNullable<GenerateRequest['messages']>;

export interface ChatFormat {
  readonly modelId: string;
  /** Jinja source, or null if the model has no chat format. */
  readonly chatTemplate: string | null;
  /** Texts of special tokens that templates name (bos_token, eos_token). */
  readonly specialTokens: Readonly<Record<string, string>>;
}

/** Renders a conversation, ready for the assistant's answer. */
export type RenderChat = (messages: Messages) => string;

function reasonOf(cause: unknown): string {
  return (cause instanceof Error ? cause.message : String(cause)).split('\n', 1).join('');
}

export function createChat({ modelId, chatTemplate, specialTokens }: ChatFormat): RenderChat {
  const refuse = (reason: string, cause?: unknown) => (): never => {
    throw new LaminaError('invalid_request', reason, { cause });
  };
  if (chatTemplate === null) return refuse(`messages: the model "${modelId}" has no chat template; send a prompt`);
  let template: Template;
  try {
    template = new Template(chatTemplate);
  } catch (cause) {
    return refuse(
      `messages: the chat template of "${modelId}" cannot be used (${reasonOf(cause)}); send a prompt`,
      cause,
    );
  }
  return (messages) => {
    try {
      return template.render({ ...specialTokens, messages, add_generation_prompt: true });
    } catch (cause) {
      throw new LaminaError('invalid_request', `messages: the chat template refuses them: ${reasonOf(cause)}`, {
        cause,
      });
    }
  };
}
