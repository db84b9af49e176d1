// Small widgets shared by the pages.
import { html, useEffect, useId, useRef, useState } from './html.js';
import { LEVELS, percent, shortened } from './words.js';

/** An error or a note; `again` adds a retry button. */
export function Notice({ error, children, again, calm = false }) {
	if (!error && !children) return null;
	return html`<div class=${calm ? 'notice calm' : 'notice'} role=${calm ? 'status' : 'alert'}>
		<p>${error ? html`<${Says} text=${error.message} />` : children}</p>
		${again && html`<button type="button" class="quiet" onClick=${again}>Try again</button>`}
	</div>`;
}

/** Makes a sentence of a message: the gateway's messages start in lower case. */
export const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}${/[.!?…]["'”’)]*$/.test(text) ? '' : '.'}`;

/** A message as a sentence, with what stands in backticks as code. */
export function Says({ text }) {
	const parts = sentence(text).split('`');
	return parts.length % 2 ? parts.map((part, place) => (place % 2 ? html`<code>${part}</code>` : part)) : text;
}

/** A labelled input or text area; `onValue` gets the value, `rest` goes to the control. */
export function Input({ label, hint, area = false, onValue, ...rest }) {
	const id = useId();
	const control = {
		id, onInput: (event) => onValue?.(event.target.value), 'aria-describedby': hint ? `${id}-hint` : undefined, ...rest,
	};
	return html`<div class="field">
		<label for=${id}>${label}</label>
		${area ? html`<textarea ...${control}></textarea>` : html`<input ...${control} />`}
		${hint && html`<p class="hint" id=${`${id}-hint`}>${hint}</p>`}
	</div>`;
}

export const UserId = (rest) => html`<${Input} label="User id" required autocomplete="off" spellcheck=${false} ...${rest} />`;

/** A list of names and values, without empty rows. */
export function Facts({ rows, label }) {
	return html`<dl class="facts" aria-label=${label}>
		${rows.filter(([, value]) => value != null && value !== '').map(([name, value, mono]) => html`<div key=${name}>
			<dt>${name}</dt><dd class=${mono ? 'mono' : ''}>${value}</dd>
		</div>`)}
	</dl>`;
}

export function Level({ level }) {
	return html`<span class=${`level ${level}`}>${LEVELS[level] ?? level}</span>`;
}

export const anchorsTitle = (anchors) => (anchors[0]?.weight === null ? 'Nearest anchors' : 'Anchors that speak');

/** The anchors of a recipe as bars, or the nearest ones if the recipe names none. */
export function Anchors({ anchors, detailed = false }) {
	if (!anchors.length) return html`<p class="dim">No anchor speaks.</p>`;
	const shown = ({ weight, similarity }) => weight ?? similarity;
	const most = Math.max(1, ...anchors.map((anchor) => Math.abs(shown(anchor))));
	const away = anchors.some((anchor) => shown(anchor) < 0);
	return html`<ul class="bars" aria-label=${anchorsTitle(anchors)}>
		${anchors.map(({ id, weight, similarity, gain }) => html`<li key=${id}>
			<span class="mono">${id}</span>
			<${Bar} share=${Math.abs(weight ?? similarity) / most} less=${(weight ?? similarity) < 0} />
			<span class="figure">${weight == null ? similarity.toFixed(2) : percent(weight)}</span>
			${detailed && html`<span class="why">
				${weight != null && similarity != null && html`<span>similarity ${similarity.toFixed(2)}</span>`}
				${gain != null && html`<span>predicted gain ${gain.toFixed(3)} nats per token</span>`}
			</span>`}
		</li>`)}
	</ul>
	${(away || most > 1) && html`<p class="hint legend">
		${away && html`<span><${Bar} share=${1} less /> moves away from the anchor</span>`}
		${most > 1 && html`<span>A whole bar is ${percent(most)}.</span>`}
	</p>`}`;
}

export function Bar({ share, less = false }) {
	return html`<span class=${less ? 'bar less' : 'bar'} aria-hidden="true">
		<span style=${{ width: `${Math.max(1, share * 100)}%` }}></span>
	</span>`;
}

/** A button that copies a text and briefly confirms it. */
export function Copy({ label, text }) {
	const [said, setSaid] = useState('');
	useEffect(() => {
		const timer = said && setTimeout(() => setSaid(''), 2500);
		return () => clearTimeout(timer);
	}, [said]);
	const copy = async () => {
		try {
			await navigator.clipboard.writeText(text());
			setSaid('copied');
		} catch {
			setSaid('the browser refused');
		}
	};
	return html`<span class="copy">
		<button type="button" class="quiet" onClick=${copy}>${label}</button>
		<span role="status" class="dim">${said}</span>
	</span>`;
}

/** A button that asks for confirmation. */
export function Sure({ label, question, onYes }) {
	const [asking, setAsking] = useState(false);
	const yes = useRef();
	const first = useRef();
	useEffect(() => { if (asking) yes.current?.focus(); }, [asking]);
	const no = () => { setAsking(false); setTimeout(() => first.current?.focus()); };
	if (!asking) {
		return html`<button ref=${first} type="button" class="quiet danger" onClick=${() => setAsking(true)}>${label}</button>`;
	}
	return html`<span class="sure" role="group" aria-label=${question}
			onKeyDown=${(event) => event.key === 'Escape' && no()}>
		<span>${question}</span>
		<button ref=${yes} type="button" class="danger" onClick=${() => { setAsking(false); onYes(); }}>${label}</button>
		<button type="button" class="quiet" onClick=${no}>Keep</button>
	</span>`;
}

/** The result of an erasure. */
export function Erased({ erased }) {
	const parts = Object.entries(erased.erased).filter(([, many]) => many).map(([what, many]) => `${many} ${what}`);
	return html`<${Notice} calm>
		Erased ${shortened(erased.user_id, 64)}: ${parts.join(', ') || 'no data'}.
		${' '}The store's file on disk is rewritten by ${new Date(erased.log_rewritten_by).toLocaleTimeString()}.
	<//>`;
}
