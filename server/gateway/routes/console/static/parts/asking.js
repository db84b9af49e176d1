// One streamed answer and its display: text, anchors and timings.
import { events, wasStopped } from '../api.js';
import { asBody, route } from '../reading/snippets.js';
import { html } from './html.js';
import { Anchors, Level, Notice, Says, sentence } from './widgets.js';
import { count, figure, milliseconds } from './words.js';

export const BLANK = { phase: 'idle', text: '', own: '' }; // `own`: `u` for each character that a phrase proposed, else `-`

/** Asks, and calls `tell` with every new state of the answer. Never throws. */
export async function ask(question, personalize, signal, tell) {
	const sent = performance.now();
	let state = { ...BLANK, phase: 'waiting' };
	const change = (more) => tell(state = { ...state, ...more });
	change({});
	try {
		const body = { ...asBody(question), personalize, stream: true };
		if (personalize === 'none') for (const field of ['strength', 'history', 'words']) delete body[field];
		for await (const chunk of events('POST', route(question), body, signal)) {
			const now = performance.now();
			const piece = chunk.choices?.[0]?.delta?.content;
			if (chunk.personalization) change({ who: chunk.personalization });
			if (piece) {
				const own = state.own + (chunk.moved ? 'u' : '-').repeat(piece.length);
				change({ phase: 'streaming', text: state.text + piece, own, ttft: state.ttft ?? now - sent, first: state.first ?? now });
			}
			if (chunk.kept) change({ kept: chunk.kept, missing: chunk.missing });
			if (chunk.usage) change({ usage: chunk.usage, rate: rate(chunk.usage, now - state.first) });
			if (chunk.choices?.[0]?.finish_reason) change({ finish: chunk.choices[0].finish_reason, moved: chunk.moved });
		}
		change({ phase: 'done' });
	} catch (error) {
		change(wasStopped(error) ? { phase: 'stopped' } : { phase: 'failed', error });
	}
	return state;
}

const rate = (usage, since) => (usage.completion_tokens > 1 && since > 0 ? ((usage.completion_tokens - 1) / since) * 1000 : null);

export const busy = ({ phase }) => phase === 'waiting' || phase === 'streaming';

const REASONS = {
	'unknown user': 'Nothing is stored about this user, so the base model answers.',
	'the request asked for the base model': '', // its card says so
};
const PHASES = { waiting: 'Waiting for the first token …', stopped: 'Stopped.', done: 'The answer is empty.' };

/** One side of the comparison; `marked` is the text with its differences, when known. */
export function Answer({ title, hint, answer, marked, again }) {
	const { phase, text, who, error } = answer;
	return html`<section class="card answer" aria-label=${title}>
		<header><h2>${title}</h2>${who && html`<${Level} level=${who.level} />`}</header>
		<div class="text" aria-live="polite" aria-busy=${busy(answer)}>
			${text ? shown(text, answer.own, marked) : html`<p class="dim">${PHASES[phase] ?? (phase === 'failed' ? '' : hint)}</p>`}
			${phase === 'streaming' && html`<span class="caret" aria-hidden="true"></span>`}
			${answer.finish === 'length' && html`<span class="dim" title="The token limit was reached"> …</span>`}
		</div>
		${phase === 'stopped' && text && html`<p class="dim">Stopped.</p>`}
		<${Notice} error=${error && { message: text ? `The answer broke off. ${sentence(error.message)}` : error.message }} again=${again} />
		${[REASONS[who?.reason] ?? who?.reason, who?.history_reason].filter(Boolean).map((reason) => html`
			<p key=${reason} class="hint"><${Says} text=${reason} /></p>`)}
		${answer.kept && html`<p class="hint">${keeps(answer)}</p>`}
		${who && who.level !== 'base' && html`<${Anchors} anchors=${who.anchors} />`}
		<${Stats} answer=${answer} />
	</section>`;
}

/** Which facts of a draft are still there. */
function keeps({ kept, missing }) {
	const counts = Object.entries(kept).map(([kind, of]) => `${of} ${kind}`).join(', ') || 'there are no numbers or names';
	return `Kept of the draft: ${counts}.${missing.length ? ` Missing: ${missing.join(', ')}.` : ''}`;
}

/** The text with its differences marked, when known, and what the user's own phrases proposed underlined. */
function shown(text, own, marked = [[text, false]]) {
	let at = 0;
	const said = (run) => {
		const part = text.slice(at, at += run.length);
		return run[0] === 'u' ? html`<u>${part}</u>` : part;
	};
	return marked.map(([piece, differs], index) => {
		const parts = own.slice(at, at + piece.length).match(/u+|-+/g)?.map(said);
		return differs ? html`<mark key=${index}>${parts}</mark>` : parts;
	});
}

function Stats({ answer: { usage, ttft, rate: speed, moved } }) {
	if (ttft == null) return null;
	return html`<dl class="stats">
		<div><dt>First token</dt><dd>${milliseconds(ttft)}</dd></div>
		${usage && html`<div><dt>Tokens</dt><dd>${usage.prompt_tokens} in, ${usage.completion_tokens} out</dd></div>`}
		${moved > 0 && html`<div><dt>From own words</dt><dd>${count(moved, 'token')}</dd></div>`}
		${speed && html`<div><dt>Speed</dt><dd>${figure(speed)} tokens/s</dd></div>`}
	</dl>`;
}
