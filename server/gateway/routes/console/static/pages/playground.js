// The base model's answer and the personal answer to one question, side by side.
// With a bank for drafts: a draft and its rewriting.
import { call, userPath } from '../api.js';
import { Answer, ask, BLANK, busy } from '../parts/asking.js';
import { useBank } from '../parts/bank.js';
import { html, useEffect, useMemo, useRef, useState } from '../parts/html.js';
import { note, permalink } from '../parts/links.js';
import { Copy, Erased, Input, Notice, Sure, UserId } from '../parts/widgets.js';
import { count, pieces, shortened, titled } from '../parts/words.js';
import { compared } from '../reading/diff.js';
import { EXAMPLES } from '../reading/examples.js';
import { asCurl, asPython } from '../reading/snippets.js';

const THROWAWAY = /^console-[0-9a-f]{10}$/;
const CHAT = { name: 'chat', instruction: '', field: 'input', fields: ['input', 'output'] }; // until the bank is known

const throwaway = () => {
	const random = crypto.getRandomValues(new Uint8Array(5));
	return `console-${Array.from(random, (byte) => byte.toString(16).padStart(2, '0')).join('')}`;
};

/** Waits until a worker has read a new user's texts, which takes a second or two, so that their first answer has them. */
async function read(id, signal) {
	for (let tries = 0; tries < 20; tries += 1) {
		const { phrases } = await call('GET', userPath(id), undefined, { signal });
		if (phrases != null) return;
		await new Promise((done) => { setTimeout(done, 250); });
	}
}

const numberIn = (params, name, otherwise) => (params.has(name) ? Number(params.get(name)) || 0 : otherwise);

export function Playground({ params }) {
	const [bank, unknown] = useBank();
	const [from, setFrom] = useState(params.has('user') ? 'id' : 'paste');
	const [user, setUser] = useState(params.get('user') ?? '');
	const [pasted, setPasted] = useState('');
	const [stored, setStored] = useState(null); // {id, text} of the temporary user
	const [erased, setErased] = useState(null);
	const [prompt, setPrompt] = useState(params.get('ask') ?? '');
	const [strength, setStrength] = useState(numberIn(params, 'strength', 1));
	const [maxTokens, setMaxTokens] = useState(numberIn(params, 'tokens', null));
	const [temperature, setTemperature] = useState(numberIn(params, 'temperature', null));
	const [history, setHistory] = useState(numberIn(params, 'history', 0));
	const [words, setWords] = useState(params.has('words') ? params.get('words') === 'true' : null);
	const [asked, setAsked] = useState(null);
	const [base, setBase] = useState(BLANK);
	const [personal, setPersonal] = useState(BLANK);
	const [fault, setFault] = useState(null);
	const run = useRef();
	const form = useRef();
	useEffect(() => () => run.current?.abort(), []);
	useEffect(() => { // the bank says what a link asks for
		if ((bank || unknown) && params.has('user') && params.has('ask')) askBoth();
	}, [bank, unknown]);

	async function store(signal) {
		if (from === 'id') return user.trim();
		const items = pieces(pasted);
		if (!items.length) throw new Error('Paste at least one line of text, or choose a user by id.');
		const id = stored?.id ?? throwaway();
		if (stored?.text !== pasted) {
			setStored({ id, text: null });
			await call('PUT', `${userPath(id)}/profile`, { items }, { signal });
			setStored({ id, text: pasted });
			setErased(null);
			if (bank?.phrases) await read(id, signal);
		}
		return id;
	}

	/** The base model answers a question; a draft stands there itself. */
	const askBase = (question, signal) => (question.drafted
		? setBase({ phase: 'done', text: question.prompt, own: '-'.repeat(question.prompt.length) })
		: ask(question, 'none', signal, setBase));

	async function askBoth() {
		const { signal } = restart();
		setBase(BLANK);
		setPersonal(BLANK);
		setFault(null);
		try {
			const question = { user: await store(signal), prompt: whole(prompt), drafted, maxTokens, temperature, history, strength, words };
			setAsked(question);
			note('playground', linked(question));
			await Promise.all([
				askBase(question, signal),
				ask(question, 'auto', signal, setPersonal),
			]);
		} catch (error) {
			if (!signal.aborted) setFault(error);
		}
	}

	function askAgain(value) {
		setStrength(value);
		if (!asked) return;
		const { signal } = restart();
		const question = { ...asked, strength: value };
		setAsked(question);
		note('playground', linked(question));
		if (busy(base)) askBase(question, signal);
		ask(question, 'auto', signal, setPersonal);
	}

	function restart() {
		run.current?.abort();
		run.current = new AbortController();
		return run.current;
	}

	async function erase(id) {
		setFault(null);
		try {
			setErased(await call('DELETE', userPath(id)));
			setStored(null);
			if (id === user) setUser('');
		} catch (error) {
			setFault(error);
		}
	}

	const task = bank?.task ?? CHAT;
	const drafted = task.name === 'rewrite';
	const instruction = drafted ? '' : task.instruction;
	const free = task.name === 'chat';
	const whole = (typed) => (typed.startsWith(instruction) ? typed : instruction + typed).trim();
	const useExample = () => { setPasted(EXAMPLES[task.name].writing); setPrompt(EXAMPLES[task.name].question); };
	const mute = Boolean(bank) && !bank.common_row;
	const asking = busy(base) || busy(personal);
	const sides = useMemo(
		() => (base.phase === 'done' && personal.phase === 'done' ? compared(base.text, personal.text) : null),
		[base, personal],
	);
	const kept = from === 'paste' ? stored?.id : THROWAWAY.test(user) && user;
	const keys = (event) => {
		if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) form.current.requestSubmit();
	};
	const submit = (event) => { event.preventDefault(); askBoth(); };

	return html`
		<h1 tabindex="-1">${free ? 'Playground' : `Playground: ${task.name.replaceAll('_', ' ')}`}</h1>
		<p class="lead">${free ? 'Ask the base model and one user’s personal model the same question.'
			: drafted ? 'Give a draft from anywhere back in one user’s own words.'
				: 'Give the base model and one user’s personal model the same of what this bank is for.'}</p>
		<form class="card ask" ref=${form} onSubmit=${submit} onKeyDown=${keys}>
			<fieldset class="who">
				<legend>Who asks</legend>
				<div class="choice">
					${[['paste', 'Somebody whose writing I paste'], ['id', 'A user by id']].map(([value, label]) => html`
						<label key=${value}><input type="radio" name="from" value=${value} checked=${from === value}
							onChange=${() => setFrom(value)} />${label}</label>`)}
				</div>
				${from === 'id'
					? html`<${UserId} value=${user} onValue=${setUser} hint="The exact id. The base model answers unknown users." />`
					: html`<${Input} area rows="4" label="A few lines of their writing" value=${pasted} onValue=${setPasted}
							hint=${html`One text per line, or texts separated by empty lines${free ? '' : html`; or JSON objects with
								${' '}<code>${task.fields.join(', ')}</code>`}.
								${pasted.trim() ? ` ${count(pieces(pasted).length, 'piece')}.` : ' '}
								${!pasted && EXAMPLES[task.name] && html`<button type="button" class="link" onClick=${useExample}>Use an example</button>`}`} />`}
				${kept && html`<div class="kept"><p>Stored as <span class="mono">${kept}</span> until it is erased.</p>
					<${Sure} label="Erase" question="Erase this writing?" onYes=${() => erase(kept)} /></div>`}
				${erased && html`<${Erased} erased=${erased} />`}
			</fieldset>
			<div class="question">
				<${Input} area rows=${free ? 2 : 4} required=${task.field} label=${free ? 'Question' : titled(task.field ?? 'question')}
					hint=${`${instruction && `Asked as “${shortened(instruction.trim(), 200)}” and this text. `}Ctrl+Enter or ⌘+Enter asks.`}
					value=${prompt.startsWith(instruction) ? prompt.slice(instruction.length) : prompt} onValue=${setPrompt} />
				<${Input} type="range" min="0" max="1" step="0.05" label=${`Strength ${strength.toFixed(2)}`} value=${strength}
					disabled=${mute} onValue=${(value) => setStrength(Number(value))} onChange=${(event) => askAgain(Number(event.target.value))}
					hint=${mute ? 'This bank has no common row to replace the anchors, so strength is always 1.'
						: 'Factor on the anchors’ weights. A new value asks again.'} />
				<details onInvalidCapture=${(event) => { event.currentTarget.open = true; }}>
					<summary>Settings</summary>
					<div class="row">
						${[['Tokens at most', maxTokens, setMaxTokens, 1, 4096, 1, null], ['Temperature', temperature, setTemperature, 0, 2, 0.1, null],
							['Past items in the prompt', history, setHistory, 0, 16, 1, 0]].map(([label, value, set, min, max, step, empty]) => html`
							<${Input} key=${label} type="number" placeholder="server’s default" label=${label} value=${value ?? ''}
								min=${min} max=${max} step=${step} onValue=${(typed) => set(typed === '' ? empty : Number(typed))} />`)}
						<fieldset class="field">
							<legend>Their own repeated words</legend>
							<div class="choice">${[['Auto', null], ['On', true], ['Off', false]].map(([label, value]) => html`
								<label key=${label}><input type="radio" name="words" checked=${words === value}
									onChange=${() => setWords(value)} />${label}</label>`)}</div>
						</fieldset>
					</div>
				</details>
				<div class="actions">
					<button type="submit" class="main">${drafted ? 'Rewrite' : 'Ask'}</button>
					${asking && html`<button type="button" onClick=${() => run.current.abort()}>Stop</button>`}
				</div>
				<${Notice} error=${fault} />
			</div>
		</form>
		<div class="pair even">
			<${Answer} title=${drafted ? 'Draft' : 'Base model'} hint=${drafted ? 'The draft appears here.' : 'Its answer appears here.'}
				answer=${base} marked=${sides?.[0]} again=${askBoth} />
			<${Answer} title=${asked && !THROWAWAY.test(asked.user) ? shortened(asked.user, 64) : 'Personal'} hint="The answer for this person appears here."
				answer=${personal} marked=${sides?.[1]} again=${askBoth} />
		</div>
		${asked && html`<div class="actions end">
			${sides && html`<p class="dim">${sides.length ? html`<mark>Marked</mark> words are not in the other answer.`
				: 'The answers have too few words in common to mark those that differ.'}
				${personal.moved > 0 && html`${' '}<u>Underlined</u> words are what this person repeats in their own texts.`}</p>`}
			<${Copy} label="Copy link" text=${() => permalink('playground', linked(asked))} />
			<${Copy} label="Copy as curl" text=${() => asCurl(asked)} />
			<${Copy} label="Copy as Python" text=${() => asPython(asked)} />
		</div>`}`;
}

const linked = ({ user, prompt, strength, maxTokens, temperature, history, words }) => ({
	user,
	ask: prompt,
	strength: strength === 1 ? null : strength,
	tokens: maxTokens,
	temperature,
	history: history || null,
	words,
});
