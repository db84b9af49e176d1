// An example for each task: what somebody has written, and what to ask for.
const lines = (...items) => items.map((item) => (typeof item === 'string' ? item : JSON.stringify(item))).join('\n');

export const EXAMPLES = {
	chat: {
		writing: lines(
			'Thanks for the quick reply, Jo. Thursday at ten suits me well, I will bring the plans. Best, Ada',
			'No news from the printer yet, I will call them after lunch and tell you what they say. Best, Ada',
			'The draft is fine apart from page two, where the dates are still last year’s. Best, Ada',
		),
		question: 'Can we move our meeting to Friday?',
	},
	citation: {
		writing: lines({ title: 'Mixing small adapters for many readers', abstract: 'We merge small adapters by what each reader has written.' }),
		question: 'Choosing adapters by evidence',
	},
	movie_tagging: {
		writing: lines({ description: 'A lone pilot wakes on a station that nobody answers for.', tag: 'sci-fi' }),
		question: 'Two brothers rob the bank that took their farm.',
	},
	news_category: {
		writing: lines({ title: 'A quieter week in the mountains', text: 'Huts stay open until the first snow.', category: 'travel' }),
		question: 'The night train to the coast runs again, with a dining car.',
	},
	news_headline: {
		writing: lines(
			{ title: 'What the Rain Left Behind', text: 'The river rose two metres overnight and left mud in forty cellars.' },
			{ title: 'What the Town Wants Now', text: 'At a meeting on Tuesday residents asked for a dam and for better warnings.' },
		),
		question: 'The council voted on Monday to build a dam above the old mill, after the third flood in five years.',
	},
	product_rating: {
		writing: lines({ text: 'Keeps tea warm for an hour and never drips.', score: 5 }),
		question: 'The lid broke in the first week, but they sent another.',
	},
	movie_rating: {
		writing: lines({ text: 'Slow, with long looks at the sea.', score: 4 }),
		question: 'A chase through three cities, loud from the first minute.',
	},
	rewrite: {
		writing: lines(
			{ text: 'Thanks for the quick reply, Jo. Thursday at ten suits me well, I will bring the plans. Best, Ada' },
			{ text: 'No news from the printer yet, I will call them after lunch and tell you what they say. Best, Ada' },
		),
		question: 'The meeting with Tom is moved to Tuesday at 10:30. Please confirm that you can attend.',
	},
	scholarly_title: {
		writing: lines({ title: 'How Rivers Remember Floods', abstract: 'We read a century of floods from the mud of one lake.' }),
		question: 'We ask how trees along a river record dry summers.',
	},
	tweet_paraphrase: { writing: lines('up at five, the sea was flat as a plate', 'no waves again. coffee instead'), question: '' },
};
